//! What a worker sends to NOTIFY_SOCKET.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reuseportd_wire::notify::{self, Notification};

fuzz_target!(|datagram: &[u8]| {
    for said in notify::decode(datagram) {
        if let Notification::Status(text) = said {
            let shown = reuseportd_fuzz::status(&text);
            assert!(shown.chars().count() <= 200 && !shown.contains(char::is_control), "{shown:?}");
        }
    }
});
