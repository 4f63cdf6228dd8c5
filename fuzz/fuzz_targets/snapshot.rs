//! The state that a re-exec or an adoption goes on with.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|state: &[u8]| reuseportd_fuzz::snapshot(state));
