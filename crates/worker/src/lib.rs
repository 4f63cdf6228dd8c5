//! SDK for worker programs: bind, hand over, serve, stop without losing a connection
