//! The handover channel, in both directions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reuseportd_wire::channel::{FromWorker, ToWorker};

fuzz_target!(|datagram: &[u8]| {
    // What was understood can be said again and means the same.
    if let Ok(message) = FromWorker::decode(datagram) {
        let again = message.encode().expect("what was read can be said");
        assert_eq!(FromWorker::decode(again.as_bytes()), Ok(message));
    }
    if let Ok(message) = ToWorker::decode(datagram) {
        let again = message.encode().expect("what was read can be said");
        assert_eq!(ToWorker::decode(again.as_bytes()), Ok(message));
    }
    // Whatever the words of an error are, it is one line.
    if let Ok(text) = std::str::from_utf8(datagram) {
        let line = FromWorker::Error(text.to_owned()).encode().expect("any text can be told");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
});
