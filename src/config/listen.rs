//! `[[listen]]`: addresses that can be owned by workers and steered, and that keep out of each other's way.

use std::net::{IpAddr, SocketAddr};

use toml::Spanned;

use super::problems::{FILE_START, Problems};
use super::schema;
use super::unsupported::NOT_YET;
use super::values::{Refused, parse_name, refused};
use super::{Bind, EngineChoice, Listen};

/// Each costs every worker a descriptor and a socket; more is a slip.
const LISTEN_MAX: usize = 256;

/// Checks all entries, each by itself and then against each other.
pub(super) fn resolve(raw: &[Spanned<schema::Listen>], problems: &mut Problems) -> Vec<Listen> {
    if raw.is_empty() {
        problems.add(
            "listen",
            Some(FILE_START),
            "missing",
            "say where workers listen:\n[[listen]]\naddress = \"0.0.0.0:8080\"",
        );
    }
    if let Some(first_too_many) = raw.get(LISTEN_MAX) {
        let message = format!("more than {LISTEN_MAX} [[listen]]");
        problems.add(
            "listen",
            Some(first_too_many.span()),
            message,
            "each worker owns a listener on each of them",
        );
    }
    let mut all: Vec<Listen> = Vec::new();
    for (index, entry) in raw.iter().take(LISTEN_MAX).enumerate() {
        let Some(listen) = resolve_one(&format!("listen[{index}]"), entry, problems) else { continue };
        let (raw, span) = (entry.get_ref(), entry.span());
        if all.iter().any(|other| other.name == listen.name) {
            let place = raw.name.as_ref().map_or(span.clone(), Spanned::span);
            let message = format!("{:?} is taken by another [[listen]]", listen.name);
            problems.add(
                format!("listen[{index}].name"),
                Some(place),
                message,
                "give each [[listen]] its own name",
            );
        }
        if let Some((other, why)) =
            all.iter().find_map(|other| clash(other.place(), listen.place()).map(|why| (other, why)))
        {
            let place = raw.address.as_ref().map_or(span, Spanned::span);
            let message =
                format!("{} and {} (listen {:?}) overlap", listen.address, other.address, other.name);
            problems.add(format!("listen[{index}].address"), Some(place), message, why);
        }
        all.push(listen);
    }
    all
}

fn resolve_one(key: &str, entry: &Spanned<schema::Listen>, problems: &mut Problems) -> Option<Listen> {
    let raw = entry.get_ref();
    problems.choice(&format!("{key}.protocol"), &raw.protocol, [("tcp", ()), ("udp", ())]);
    let bind = problems.choice(
        &format!("{key}.bind"),
        &raw.bind,
        [("worker", Bind::Worker), ("master", Bind::Master)],
    );
    problems.choice(&format!("{key}.affinity"), &raw.affinity, [("none", ()), ("flow", ())]);
    problems.wait(&format!("{key}.flow_timeout"), &raw.flow_timeout, std::time::Duration::from_secs(120));
    let backlog =
        problems.number(&format!("{key}.backlog"), &raw.backlog, 1..=i32::MAX.unsigned_abs(), 4096_u32);
    let name = match &raw.name {
        Some(name) => problems.text(&format!("{key}.name"), name, parse_name),
        None => Some("default".to_owned()),
    };
    let address_key = format!("{key}.address");
    let Some(address) = &raw.address else {
        problems.add(address_key, Some(entry.span()), "missing", "for example address = \"0.0.0.0:8080\"");
        return None;
    };
    let address = problems.text(&address_key, address, parse_address)?;
    let v6only = raw.v6only.as_ref().is_some_and(|v6only| *v6only.get_ref());
    if v6only && address.is_ipv4() {
        let place = raw.v6only.as_ref().map(Spanned::span);
        problems.add(format!("{key}.v6only"), place, "is for IPv6 addresses", "leave it out");
    }
    let force_reuseport = raw.force_reuseport.as_ref().is_some_and(|force| *force.get_ref());
    if force_reuseport && bind == Bind::Master {
        let place = raw.force_reuseport.as_ref().map(Spanned::span);
        let message = "is for sockets that workers bind, and with bind = \"master\" they don't";
        problems.add(format!("{key}.force_reuseport"), place, message, "leave one of them out");
    }
    Some(Listen { name: name?, address, bind, v6only, backlog, force_reuseport })
}

/// Reads `"0.0.0.0:8080"` or `"[::]:8080"`.
fn parse_address(text: &str) -> Result<SocketAddr, Refused> {
    if text.starts_with("unix:") {
        let help = "unix sockets will need bind = \"master\"; use an IP address";
        return Err(refused(text, &format!("is {NOT_YET}"), help));
    }
    let Ok(address) = text.parse::<SocketAddr>() else {
        let hint = near_address(text).map(|near| format!("did you mean \"{near}\"? ")).unwrap_or_default();
        let help = format!("{hint}allowed: \"IPV4:PORT\" or \"[IPV6]:PORT\", no host names");
        return Err(refused(text, "is not an address", help));
    };
    let ip = address.ip();
    if address.port() == 0 {
        let help = "each worker would get a port of its own, with no group to steer: choose one, 1 to 65535";
        return Err(refused(text, "has port 0", help));
    }
    if ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255]) {
        return Err(refused(text, "is no address of one host", "no TCP listener can bind it"));
    }
    if ip != ip.to_canonical() {
        let canonical = SocketAddr::new(ip.to_canonical(), address.port());
        return Err(refused(text, "is an IPv4 address in IPv6 dress", format!("write \"{canonical}\"")));
    }
    Ok(address)
}

/// The address somebody had in mind who wrote `8080`, `:8080`, `localhost:8080`, `*:8080` or `::1:8080`.
fn near_address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let port: u16 = port.parse().ok().filter(|port| *port > 0)?;
    let host = match host {
        "" | "*" => "0.0.0.0",
        "localhost" => "127.0.0.1",
        host => host,
    };
    Some(SocketAddr::new(host.parse().ok()?, port))
}

/// Sockets that share an address without being steered lose connections.
pub(super) fn check_engine(raw: &[Spanned<schema::Listen>], engine: EngineChoice, problems: &mut Problems) {
    for (index, listen) in raw.iter().enumerate() {
        let asked = listen.get_ref().force_reuseport.as_ref().filter(|force| *force.get_ref());
        if let Some(asked) = asked.filter(|_| engine == EngineChoice::None) {
            let help = "leave it out, or set steering.engine to \"auto\"";
            let key = format!("listen[{index}].force_reuseport");
            problems.add(key, Some(asked.span()), "needs an engine that steers", help);
        }
    }
}

impl Listen {
    /// The address, and whether it leaves IPv4 alone.
    pub(crate) fn place(&self) -> (SocketAddr, bool) {
        (self.address, self.v6only)
    }
}

/// Why two addresses, each with its `v6only`, can't be steered apart: the kernel delivers to the more specific group
/// first.
pub(crate) fn clash(
    (a, a_v6only): (SocketAddr, bool),
    (b, b_v6only): (SocketAddr, bool),
) -> Option<&'static str> {
    let any = |ip: IpAddr| ip.is_unspecified();
    let takes_v4 = |address: SocketAddr, v6only: bool| address.is_ipv6() && any(address.ip()) && !v6only;
    if a.port() != b.port() {
        None
    } else if a == b {
        Some("each address belongs to one [[listen]]: remove one of them")
    } else if a.ip() == b.ip() {
        None // link-local addresses of different interfaces
    } else if a.is_ipv4() == b.is_ipv4() && (any(a.ip()) || any(b.ip())) {
        Some(
            "the wildcard takes that address too, so one takes the traffic of the other: \
             keep the wildcard, or list the addresses one by one",
        )
    } else if a.is_ipv4() != b.is_ipv4() && (takes_v4(a, a_v6only) || takes_v4(b, b_v6only)) {
        Some("[::] takes IPv4 connections too: keep [::] alone, or set v6only = true for it")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_overlap() {
        let v6only = |text: &str| text.ends_with('6');
        let place = |text: &str| (text.trim_end_matches(" v6").parse().unwrap(), v6only(text));
        let clash = |a: &str, b: &str| clash(place(a), place(b)).is_some();
        for (a, b) in [
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "0.0.0.0:80"),
            ("[::]:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
        ] {
            assert!(clash(a, b) && clash(b, a), "{a} {b}");
        }
        for (a, b) in [
            ("0.0.0.0:80", "0.0.0.0:81"),
            ("127.0.0.1:80", "127.0.0.2:80"),
            ("0.0.0.0:80", "[::1]:80"),
            ("0.0.0.0:80", "[::]:80 v6"),
            ("[fe80::1%1]:80", "[fe80::1%2]:80"),
        ] {
            assert!(!clash(a, b) && !clash(b, a), "{a} {b}");
        }
    }

    #[test]
    fn wrong_addresses_are_told_with_the_right_one() {
        for (written, said) in [
            ("8080", "did you mean \"0.0.0.0:8080\""),
            (":8080", "did you mean \"0.0.0.0:8080\""),
            ("localhost:80", "did you mean \"127.0.0.1:80\""),
            ("::1:80", "did you mean \"[::1]:80\""),
            ("example.org:80", "no host names"),
            ("0.0.0.0:0", "port 0"),
            ("0.0.0.0:65536", "not an address"),
            ("224.0.0.1:80", "no TCP listener"),
            ("[::ffff:1.2.3.4]:80", "write \"1.2.3.4:80\""),
            ("unix:/run/x.sock", NOT_YET),
        ] {
            let error = parse_address(written).unwrap_err().to_string();
            assert!(error.contains(said), "{written}: {error}");
        }
        assert_eq!(parse_address("[::]:80"), Ok("[::]:80".parse().unwrap()));
    }
}
