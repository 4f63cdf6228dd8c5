//! `[[listen]]` with a path.

use super::*;

/// A config with these listeners.
fn with(listen: &str) -> String {
    format!("[app]\nname = \"web\"\ncommand = [\"/bin/web\"]\n{listen}")
}

const UNIX: &str = "[[listen]]\naddress = \"unix:/run/web.sock\"\nbind = \"master\"\n";
const TCP: &str = "[[listen]]\nname = \"http\"\naddress = \"127.0.0.1:8080\"\n";

#[test]
fn paths_stand_among_addresses_in_the_files_order() {
    let second =
        "[[listen]]\nname = \"b\"\naddress = \"unix:/b\"\nbind = \"master\"\nmode = \"0600\"\nbacklog = 7\n";
    let last = "[[listen]]\nname = \"last\"\naddress = \"127.0.0.1:81\"\n";
    let config = load_text(&with(&[UNIX, TCP, second, last].concat())).unwrap();
    let order: Vec<String> = config.listeners().in_order().map(Entry::address).collect();
    assert_eq!(order, ["unix:/run/web.sock", "127.0.0.1:8080", "unix:/b", "127.0.0.1:81"]);
    let first = UnixListen {
        name: "default".into(),
        path: "/run/web.sock".into(),
        mode: 0o660,
        backlog: 4096,
        position: 0,
    };
    assert_eq!(config.unix[0], first);
    assert_eq!((config.unix[1].mode, config.unix[1].backlog, config.unix[1].position), (0o600, 7, 1));
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
}

#[test]
fn what_does_not_go_with_a_path_is_told() {
    let line = |line: &str| with(&format!("{UNIX}{line}\n"));
    for (text, said) in [
        (with(&UNIX.replace("bind = \"master\"\n", "")), "listen[0].bind: a path can be bound once only"),
        (line("protocol = \"udp\""), "listen[0].protocol: unix sockets are for streams only"),
        (line("v6only = true"), "listen[0].v6only: is for IP addresses"),
        (line("force_reuseport = true"), "listen[0].force_reuseport: is for IP addresses"),
        (line("affinity = \"flow\""), "listen[0].affinity: is for protocol = \"udp\""),
        (line("mode = \"0444\""), "lets nobody connect"),
        (with(&format!("{TCP}mode = \"0660\"\n")), "listen[0].mode: is for unix sockets"),
        (
            with(&format!("{UNIX}{}", UNIX.replace("[[listen]]", "[[listen]]\nname = \"b\""))),
            "is taken by listen",
        ),
        (
            with(&format!("{UNIX}{}", TCP.replace("\"http\"", "\"default\""))),
            "is taken by another [[listen]]",
        ),
        (
            line("[readiness]\nmethod = \"listen\""),
            "readiness.method: shows nothing where all sockets are shared",
        ),
        (
            line("[readiness]\nmethod = \"http\""),
            "readiness.method: shows nothing where all sockets are shared",
        ),
        (line("[upgrade]\nbake = \"1s\""), "upgrade.bake: not possible with bind = \"master\""),
        (
            with(UNIX).replace("\"/bin/web\"", "\"/bin/web\", \"{port.default}\""),
            "{port.default}: a unix socket has neither host nor port",
        ),
    ] {
        let summary = summary(&text);
        assert!(summary.contains(said), "{said}: {summary}");
    }
    for fine in [
        line("[upgrade]\nbatch = 1"),
        with(&format!("{UNIX}{TCP}[readiness]\nmethod = \"http\"\n")),
        with(UNIX).replace("\"/bin/web\"", "\"/bin/web\", \"{path.default}\""),
    ] {
        assert!(load_text(&fine).is_ok(), "{fine}");
    }
}
