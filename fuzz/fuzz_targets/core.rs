//! A stream of events and answers, in any order.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|story: &[u8]| {
    // It ends when the story does.
    let _ = reuseportd_fuzz::play::story(&mut Unstructured::new(story));
});
