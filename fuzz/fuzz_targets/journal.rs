//! The journal, by which a next master finds workers that nobody kept anything of.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| reuseportd_fuzz::journal(file));
