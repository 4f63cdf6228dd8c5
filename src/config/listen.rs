//! `[[listen]]`: addresses that can be owned by workers and steered, and that keep out of each other's way.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use reuseportd_wire::status::Protocol;
use toml::Spanned;

use super::problems::{FILE_START, Problems};
use super::schema;
use super::unix::{self, PREFIX};
use super::values::{Refused, parse_name, refused};
use super::{Bind, EngineChoice, Flows, Listen, Listeners, UnixListen};

/// Each costs every worker a descriptor and a socket; more is a slip.
const LISTEN_MAX: usize = 256;
/// Flows remembered unless told otherwise: some 7 MiB of the kernel's memory.
const FLOW_TABLE: u32 = 65_536;
/// Some 120 MiB. The kernel takes time to make it, in which the master does nothing else: 55 ms for so many.
const FLOW_TABLE_MAX: u32 = 1 << 20;
/// A timeout the steering program counts in nanoseconds, and nobody means a longer one.
const FLOW_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// All entries.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) ip: Vec<Listen>,
    pub(super) unix: Vec<UnixListen>,
}

/// One entry.
enum One {
    Ip(Listen),
    Unix(UnixListen),
}

impl Resolved {
    pub(super) fn all(&self) -> Listeners<'_> {
        Listeners { ip: &self.ip, unix: &self.unix }
    }

    /// What makes this address impossible beside those there are, and the other's name.
    fn clash(&self, one: &One) -> Option<(String, &'static str)> {
        let overlap = |listen: &Listen, other: &Listen, why| {
            let message =
                format!("{} and {} (listen {:?}) overlap", listen.address, other.address, other.name);
            (message, why)
        };
        match one {
            One::Ip(listen) => self.ip.iter().find_map(|other| {
                clash(other.endpoint(), listen.endpoint()).map(|why| overlap(listen, other, why))
            }),
            One::Unix(listen) => {
                let other = self.unix.iter().find(|other| other.path == listen.path)?;
                let message = format!("{} is taken by listen {:?}", listen.path.display(), other.name);
                Some((message, "each path belongs to one [[listen]]: remove one of them"))
            }
        }
    }
}

/// Checks all entries, each by itself and then against each other.
pub(super) fn resolve(raw: &[Spanned<schema::Listen>], problems: &mut Problems) -> Resolved {
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
    let mut all = Resolved::default();
    for (index, entry) in raw.iter().take(LISTEN_MAX).enumerate() {
        let Some(one) = resolve_one(&format!("listen[{index}]"), entry, all.ip.len(), problems) else {
            continue;
        };
        let name = match &one {
            One::Ip(listen) => &listen.name,
            One::Unix(listen) => &listen.name,
        };
        let (raw, span) = (entry.get_ref(), entry.span());
        if all.all().is_taken(name) {
            let place = raw.name.as_ref().map_or(span.clone(), Spanned::span);
            let message = format!("{name:?} is taken by another [[listen]]");
            problems.add(
                format!("listen[{index}].name"),
                Some(place),
                message,
                "give each [[listen]] its own name",
            );
        }
        if let Some((message, why)) = all.clash(&one) {
            let place = raw.address.as_ref().map_or(span, Spanned::span);
            problems.add(format!("listen[{index}].address"), Some(place), message, why);
        }
        match one {
            One::Ip(listen) => all.ip.push(listen),
            One::Unix(listen) => all.unix.push(listen),
        }
    }
    all
}

/// `position`: so many with an IP address come before it.
fn resolve_one(
    key: &str,
    entry: &Spanned<schema::Listen>,
    position: usize,
    problems: &mut Problems,
) -> Option<One> {
    let raw = entry.get_ref();
    let protocols = [("tcp", Protocol::Tcp), ("udp", Protocol::Udp)];
    let protocol = problems.choice(&format!("{key}.protocol"), &raw.protocol, protocols);
    let bind = problems.choice(
        &format!("{key}.bind"),
        &raw.bind,
        [("worker", Bind::Worker), ("master", Bind::Master)],
    );
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
    if address.get_ref().starts_with(PREFIX) {
        let own = (name?, backlog, position);
        return unix::resolve(key, raw, own, (protocol, bind), problems).map(One::Unix);
    }
    unix::refuse_mode(key, raw, problems);
    let flows = resolve_flows(key, raw, protocol, bind, problems);
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
    let name = name?;
    Some(One::Ip(Listen { name, protocol, address, bind, v6only, backlog, force_reuseport, flows }))
}

fn resolve_flows(
    key: &str,
    raw: &schema::Listen,
    protocol: Protocol,
    bind: Bind,
    problems: &mut Problems,
) -> Option<Flows> {
    let affinity = format!("{key}.affinity");
    let is_wanted = problems.choice(&affinity, &raw.affinity, [("none", false), ("flow", true)]);
    let timeout_key = format!("{key}.flow_timeout");
    let timeout = problems.wait(&timeout_key, &raw.flow_timeout, Duration::from_secs(120));
    let place = |value: &Option<Spanned<String>>| value.as_ref().map(Spanned::span);
    if timeout > FLOW_TIMEOUT_MAX {
        problems.add(timeout_key, place(&raw.flow_timeout), "is too long", "24h is the longest");
    }
    let table =
        problems.number(&format!("{key}.flow_table"), &raw.flow_table, 1..=FLOW_TABLE_MAX, FLOW_TABLE);
    if !is_wanted {
        return None;
    }
    if protocol == Protocol::Tcp {
        let message = "is for protocol = \"udp\": a TCP connection stays where it is anyway";
        problems.add(&affinity, place(&raw.affinity), message, "leave it out");
    } else if bind == Bind::Master {
        let message =
            "can't be had with bind = \"master\": old and new workers share the sockets of their seats";
        problems.add(&affinity, place(&raw.affinity), message, "leave one of them out");
    }
    Some(Flows { timeout, table })
}

/// Reads `"0.0.0.0:8080"` or `"[::]:8080"`.
fn parse_address(text: &str) -> Result<SocketAddr, Refused> {
    let Ok(address) = text.parse::<SocketAddr>() else {
        let hint = near_address(text).map(|near| format!("did you mean \"{near}\"? ")).unwrap_or_default();
        let help = format!("{hint}allowed: \"IPV4:PORT\", \"[IPV6]:PORT\" or \"unix:/PATH\", no host names");
        return Err(refused(text, "is not an address", help));
    };
    let ip = address.ip();
    if address.port() == 0 {
        let help = "each worker would get a port of its own, with no group to steer: choose one, 1 to 65535";
        return Err(refused(text, "has port 0", help));
    }
    if ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255]) {
        let help = "what is sent to it reaches every socket, or none: use an address of this host";
        return Err(refused(text, "is no address of one host", help));
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

/// Sockets that share an address without being steered lose connections, and only one engine remembers flows.
pub(super) fn check_engine(raw: &[Spanned<schema::Listen>], engine: EngineChoice, problems: &mut Problems) {
    for (index, listen) in raw.iter().enumerate() {
        let asked = listen.get_ref().force_reuseport.as_ref().filter(|force| *force.get_ref());
        if let Some(asked) = asked.filter(|_| engine == EngineChoice::None) {
            let help = "leave it out, or set steering.engine to \"auto\"";
            let key = format!("listen[{index}].force_reuseport");
            problems.add(key, Some(asked.span()), "needs an engine that steers", help);
        }
        let asked = listen.get_ref().affinity.as_ref().filter(|affinity| affinity.get_ref() == "flow");
        if let Some(asked) = asked.filter(|_| matches!(engine, EngineChoice::Cbpf | EngineChoice::None)) {
            let help = "leave it out, or set steering.engine to \"auto\"";
            let message = "needs the ebpf engine: nothing else remembers flows";
            problems.add(format!("listen[{index}].affinity"), Some(asked.span()), message, help);
        }
    }
}

/// Where a socket is bound: what makes a group, but for the uid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) protocol: Protocol,
    pub(crate) address: SocketAddr,
    /// `[::]` leaves IPv4 alone.
    pub(crate) v6only: bool,
}

impl Listen {
    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint { protocol: self.protocol, address: self.address, v6only: self.v6only }
    }
}

/// Why two places can't be steered apart: the kernel delivers to the more specific group first.
pub(crate) fn clash(a: Endpoint, b: Endpoint) -> Option<&'static str> {
    let any = |ip: IpAddr| ip.is_unspecified();
    let takes_v4 = |place: Endpoint| place.address.is_ipv6() && any(place.address.ip()) && !place.v6only;
    let both_v4 = takes_v4(a) || takes_v4(b);
    let is_other = a.protocol != b.protocol;
    let (a, b) = (a.address, b.address);
    if is_other || a.port() != b.port() {
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
    } else if a.is_ipv4() != b.is_ipv4() && both_v4 {
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
        let place = |text: &str| Endpoint {
            protocol: if text.starts_with("udp ") { Protocol::Udp } else { Protocol::Tcp },
            address: text.trim_start_matches("udp ").trim_end_matches(" v6").parse().unwrap(),
            v6only: v6only(text),
        };
        let clash = |a: &str, b: &str| clash(place(a), place(b)).is_some();
        for (a, b) in [
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "0.0.0.0:80"),
            ("[::]:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
            ("udp 0.0.0.0:80", "udp 127.0.0.1:80"),
        ] {
            assert!(clash(a, b) && clash(b, a), "{a} {b}");
        }
        for (a, b) in [
            ("0.0.0.0:80", "0.0.0.0:81"),
            ("0.0.0.0:80", "udp 0.0.0.0:80"),
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
            ("224.0.0.1:80", "reaches every socket"),
            ("[::ffff:1.2.3.4]:80", "write \"1.2.3.4:80\""),
        ] {
            let error = parse_address(written).unwrap_err().to_string();
            assert!(error.contains(said), "{written}: {error}");
        }
        assert_eq!(parse_address("[::]:80"), Ok("[::]:80".parse().unwrap()));
    }
}
