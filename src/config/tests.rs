//! Whole files through `load`.
