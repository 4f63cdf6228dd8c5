//! Names and datagrams, as both sides understand them.

use std::io;

use reuseportd_sys::socket::FDS_MAX;

/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 120;

/// Longest datagram: [`FDS_MAX`] of the longest names, and the verb.
pub(super) const DATAGRAM_BYTES_MAX: usize = 8192;
const _: () = assert!(FDS_MAX * (NAME_BYTES_MAX + 1) < DATAGRAM_BYTES_MAX - 64);

/// Whether descriptors can be held under this name: visible ASCII, not too long.
pub(super) fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Refuses what is no name.
pub(super) fn check_name(name: &str) -> io::Result<()> {
    if is_name(name) {
        return Ok(());
    }
    let text = format!("{name:?} is no name for the keeper: 1 to {NAME_BYTES_MAX} visible ASCII characters");
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// Verb and words of a datagram; `None` if it is no text.
pub(super) fn split(datagram: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut words = std::str::from_utf8(datagram).ok()?.split(' ');
    Some((words.next()?, words.collect()))
}

/// A datagram of a verb and names.
pub(super) fn join(verb: &str, names: &[&str]) -> String {
    std::iter::once(&verb).chain(names).copied().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_visible_and_short() {
        for good in ["a", "pidfd/17", "listener/[::1%eth0]:80", &"x".repeat(120)] {
            check_name(good).unwrap();
        }
        for bad in ["", " ", "a b", "a\n", "a\0", "ä", &"x".repeat(121)] {
            assert_eq!(check_name(bad).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
    }

    #[test]
    fn words_come_back_as_they_went() {
        assert_eq!(split(join("hold", &["a", "b"]).as_bytes()), Some(("hold", vec!["a", "b"])));
        assert_eq!(split(join("leave", &[]).as_bytes()), Some(("leave", vec![])));
        assert_eq!(split(b"\xff"), None);
        assert_eq!(split(b""), Some(("", vec![])));
    }
}
