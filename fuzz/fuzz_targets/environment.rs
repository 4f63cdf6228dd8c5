//! REUSEPORTD_LISTEN, and the file that app.environment_file names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reuseportd_wire::env::{format_listen, parse_listen};

fuzz_target!(|value: &[u8]| {
    if let Ok(text) = std::str::from_utf8(value)
        && let Ok(listeners) = parse_listen(text)
    {
        let again = format_listen(&listeners);
        assert_eq!(parse_listen(&again).as_ref(), Ok(&listeners), "{again}");
    }
    reuseportd_fuzz::environment_file(value);
});
