//! A config file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| reuseportd_fuzz::config(file));
