//! The control socket: requests, and replies with status and receipts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reuseportd_wire::control::{decode_reply, decode_request, encode};

fuzz_target!(|line: &[u8]| {
    // What was understood can be said again, in one line, and means the same.
    if let Ok(request) = decode_request(line) {
        let again = encode(&request).expect("what was read can be said");
        assert!(again.find('\n') == Some(again.len() - 1), "{again:?}");
        assert_eq!(decode_request(again.as_bytes()).expect("it was said before"), request);
    }
    if let Ok(reply) = decode_reply(line) {
        let again = encode(&reply).expect("what was read can be said");
        assert!(again.find('\n') == Some(again.len() - 1), "{again:?}");
        assert_eq!(decode_reply(again.as_bytes()).expect("it was said before"), reply);
        let _ = (reply.is_last(true), reply.is_last(false));
    }
});
