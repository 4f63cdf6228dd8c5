//! `[[listen]] address = "unix:/path"`: one socket for all workers, which the master makes.

use std::path::{Path, PathBuf};

use reuseportd_wire::status::Protocol;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::problems::Problems;
use super::values::{Refused, parse_mode, refused};
use super::{Bind, Config, Listen, saved, schema};

/// What an address of this kind begins with.
pub(super) const PREFIX: &str = "unix:";
/// `sockaddr_un.sun_path` holds 108 bytes, the last of them NUL.
const PATH_BYTES_MAX: usize = 107;
/// Who may connect unless told otherwise: the workers' user and group.
const MODE: u32 = 0o660;

/// One `[[listen]]` with a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnixListen {
    pub(crate) name: String,
    /// Absolute, and short enough for `sockaddr_un`; has no character that would part a variable which names it.
    #[serde(with = "saved::path")]
    pub(crate) path: PathBuf,
    /// Mode of its file, which belongs to the workers' user and group.
    pub(crate) mode: u32,
    /// 1 to `i32::MAX`.
    pub(crate) backlog: u32,
    /// So many of [`Config::listen`] come before it in the file.
    pub(crate) position: usize,
}

/// One `[[listen]]` of either kind.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry<'a> {
    Ip(&'a Listen),
    Unix(&'a UnixListen),
}

/// Every `[[listen]]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listeners<'a> {
    pub(crate) ip: &'a [Listen],
    pub(crate) unix: &'a [UnixListen],
}

impl<'a> Entry<'a> {
    pub(crate) fn name(self) -> &'a str {
        match self {
            Entry::Ip(listen) => &listen.name,
            Entry::Unix(listen) => &listen.name,
        }
    }

    pub(crate) fn bind(self) -> Bind {
        match self {
            Entry::Ip(listen) => listen.bind,
            Entry::Unix(_) => Bind::Master,
        }
    }

    /// As it is written in a config.
    pub(crate) fn address(self) -> String {
        match self {
            Entry::Ip(listen) => listen.address.to_string(),
            Entry::Unix(listen) => format!("{PREFIX}{}", listen.path.display()),
        }
    }
}

impl<'a> Listeners<'a> {
    /// In the order of the file, which is the order of passed sockets.
    pub(crate) fn in_order(self) -> impl Iterator<Item = Entry<'a>> {
        let before = move |from: usize, to: usize| self.ip.get(from..to).unwrap_or_default();
        let position = |index: usize| self.unix.get(index).map_or(self.ip.len(), |unix| unix.position);
        (0..=self.unix.len()).flat_map(move |index| {
            let from = index.checked_sub(1).map_or(0, position);
            let own = self.unix.get(index).map(Entry::Unix);
            before(from, position(index)).iter().map(Entry::Ip).chain(own)
        })
    }

    pub(super) fn is_taken(self, name: &str) -> bool {
        self.in_order().any(|entry| entry.name() == name)
    }
}

impl Config {
    pub(crate) fn listeners(&self) -> Listeners<'_> {
        Listeners { ip: &self.listen, unix: &self.unix }
    }
}

/// What only one with a path can have.
pub(super) fn refuse_mode(key: &str, raw: &schema::Listen, problems: &mut Problems) {
    if let Some(mode) = &raw.mode {
        let message = "is for unix sockets: an IP address has no file";
        problems.add(format!("{key}.mode"), Some(mode.span()), message, "leave it out");
    }
}

/// One whose address begins with [`PREFIX`]; name and backlog are as with any other.
pub(super) fn resolve(
    key: &str,
    raw: &schema::Listen,
    (name, backlog, position): (String, u32, usize),
    (protocol, bind): (Protocol, Bind),
    problems: &mut Problems,
) -> Option<UnixListen> {
    let at = |key_of: &str| format!("{key}.{key_of}");
    let place = |text: &Option<Spanned<String>>| text.as_ref().map(Spanned::span);
    let flag = |flag: &Option<Spanned<bool>>| flag.as_ref().filter(|on| *on.get_ref()).map(Spanned::span);
    let address = raw.address.as_ref()?;
    if bind == Bind::Worker {
        let message = "a path can be bound once only: the next generation could not bind beside this one";
        let help = "set bind = \"master\": the master makes the socket, and workers get it by LISTEN_FDS";
        let place = place(&raw.bind).unwrap_or(address.span());
        problems.add(at("bind"), Some(place), message, help);
    }
    if protocol == Protocol::Udp {
        let message = "unix sockets are for streams only";
        problems.add(at("protocol"), place(&raw.protocol), message, "leave it out");
    }
    let none_to_steer = "one socket serves all workers, so that there is nothing to steer: leave it out";
    if raw.affinity.as_ref().is_some_and(|affinity| affinity.get_ref() == "flow") {
        problems.add(at("affinity"), place(&raw.affinity), "is for protocol = \"udp\"", none_to_steer);
    }
    for (key, asked) in [("v6only", flag(&raw.v6only)), ("force_reuseport", flag(&raw.force_reuseport))] {
        if asked.is_some() {
            problems.add(at(key), asked, "is for IP addresses", "leave it out");
        }
    }
    let mode = raw.mode.as_ref().and_then(|mode| problems.text(&at("mode"), mode, parse_socket_mode));
    let path = problems.text(&at("address"), address, parse_address)?;
    Some(UnixListen { name, path, mode: mode.unwrap_or(MODE), backlog, position })
}

/// One that nobody can connect to is a slip: `660` for `0660` is none, `0066` is.
fn parse_socket_mode(text: &str) -> Result<u32, Refused> {
    let mode = parse_mode(text)?;
    let help = "for example \"0660\": whoever connects needs the right to write";
    if mode & 0o222 == 0 { Err(refused(text, "lets nobody connect", help)) } else { Ok(mode) }
}

fn parse_address(text: &str) -> Result<PathBuf, Refused> {
    let path = text.strip_prefix(PREFIX).unwrap_or(text);
    let example = "for example \"unix:/run/web/web.sock\"";
    if path.starts_with('@') {
        let help = format!("anybody may bind an abstract name, and no mode keeps anyone out; {example}");
        return Err(refused(text, "is in the abstract namespace, which is not supported", help));
    }
    let is_file = path.rsplit('/').next().is_some_and(|last| !["", ".", ".."].contains(&last));
    if !path.starts_with('/') || !is_file {
        return Err(refused(text, "is no absolute path of a file", example));
    }
    if path.chars().any(|c| c.is_control() || matches!(c, ';' | '=')) {
        let help = "workers are told the path in variables whose parts these characters divide";
        return Err(refused(text, "has a control character, ';' or '='", help));
    }
    if path.len() > PATH_BYTES_MAX {
        let message = format!("is longer than the {PATH_BYTES_MAX} bytes the path of a socket may have");
        return Err(refused(text, &message, "choose a shorter one"));
    }
    Ok(Path::new(path).components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_paths_are_told_why() {
        let long = format!("unix:/{}", "x".repeat(107));
        for (written, said) in [
            ("unix:@x", "abstract"),
            ("unix:run/x", "absolute"),
            ("unix:/run/", "absolute"),
            ("unix:", "absolute"),
            ("unix:/a;b", "variables"),
            ("unix:/a=b", "variables"),
            (long.as_str(), "107 bytes"),
        ] {
            let error = parse_address(written).unwrap_err().to_string();
            assert!(error.contains(said), "{written}: {error}");
        }
        assert_eq!(parse_address("unix:/run//./web.sock"), Ok("/run/web.sock".into()));
        assert_eq!(parse_address(&long[..long.len() - 1]).map(|path| path.as_os_str().len()), Ok(107));
    }

    #[test]
    fn modes_that_keep_everybody_out_are_slips() {
        assert_eq!(parse_socket_mode("660"), Ok(0o660));
        assert!(parse_socket_mode("0444").is_err() && parse_socket_mode("rw").is_err());
    }
}
