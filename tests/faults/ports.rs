//! Ports taken by strangers, and listeners that workers close unasked.
