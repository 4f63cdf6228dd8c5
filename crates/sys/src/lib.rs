//! The one door to the kernel: every unsafe block of reuseportd lives here
