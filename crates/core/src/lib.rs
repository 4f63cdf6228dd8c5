//! The decisions of reuseportd: a pure state machine without I/O, clock or file descriptors
