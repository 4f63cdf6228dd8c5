//! What a worker prints, or answers to a readiness request.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|printed: (usize, &[u8])| {
    let (cut, printed) = printed;
    // No more than a pipe holds.
    reuseportd_fuzz::output(&printed[..printed.len().min(60_000)], cut % (printed.len() + 1));
});
