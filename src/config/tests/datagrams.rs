//! UDP, flows, and the policy of choosing.

use std::time::Duration;

use reuseportd_wire::status::Protocol;

use super::*;

fn with(lines: &str) -> String {
    format!("{SMALLEST}{lines}\n")
}

#[test]
fn udp_listeners_and_their_flows() {
    let listen = |lines: &str| load_text(&with(lines)).unwrap().listen.remove(0);
    let plain = listen("protocol = \"udp\"");
    assert_eq!((plain.protocol, plain.flows), (Protocol::Udp, None));
    let flows = listen("protocol = \"udp\"\naffinity = \"flow\"").flows;
    assert_eq!(flows, Some(Flows { timeout: Duration::from_secs(120), table: 65_536 }));
    let flows =
        listen("protocol = \"udp\"\naffinity = \"flow\"\nflow_timeout = \"500ms\"\nflow_table = 10").flows;
    assert_eq!(flows, Some(Flows { timeout: Duration::from_millis(500), table: 10 }));
    // The values of the defaults may stand there without being wanted.
    assert_eq!(listen("affinity = \"none\"\nflow_timeout = \"2m\"").protocol, Protocol::Tcp);
    let both = "[[listen]]\nname = \"dns\"\naddress = \"127.0.0.1:8080\"\nprotocol = \"udp\"";
    assert_eq!(load_text(&with(both)).unwrap().listen.len(), 2, "TCP and UDP have ports of their own");
}

#[test]
fn what_flows_and_datagrams_do_not_go_with() {
    let udp = "protocol = \"udp\"\n";
    let flow = "affinity = \"flow\"\n";
    for (lines, says) in [
        (flow.to_owned(), "listen[0].affinity: is for protocol = \"udp\""),
        (format!("{udp}{flow}bind = \"master\""), "listen[0].affinity: can't be had with bind = \"master\""),
        (format!("{udp}{flow}[steering]\nengine = \"cbpf\""), "listen[0].affinity: needs the ebpf engine"),
        (format!("{udp}{flow}flow_timeout = \"0s\""), "listen[0].flow_timeout"),
        (format!("{udp}{flow}flow_timeout = \"25h\""), "listen[0].flow_timeout: is too long"),
        (format!("{udp}{flow}flow_table = 0"), "listen[0].flow_table: 0 is not possible"),
        (
            format!("{udp}[readiness]\nmethod = \"http\""),
            "readiness.method: needs a [[listen]] with protocol = \"tcp\"",
        ),
        (
            format!("{udp}bind = \"master\"\n[readiness]\nmethod = \"listen\""),
            "readiness.method: shows nothing where all sockets are UDP",
        ),
        ("[steering]\nengine = \"none\"\npolicy = \"cpu\"".to_owned(), "steering.policy: needs an engine"),
    ] {
        let said = summary(&with(&lines));
        assert!(said.contains(says) && !said.contains("more"), "{lines}: {said}");
    }
    assert!(load_text(&with("protocol = \"udp\"\n[readiness]\nmethod = \"listen\"")).is_ok());
}

#[test]
fn the_policy_is_by_hash_unless_by_processor() {
    let policy = |lines: &str| load_text(&with(lines)).unwrap().steering.policy;
    assert_eq!(policy(""), Policy::Hash);
    assert_eq!(policy("[steering]\npolicy = \"cpu\"\nengine = \"cbpf\""), Policy::Cpu);
}

#[test]
fn a_config_of_an_older_version_has_tcp_only() {
    let config = load_text(SMALLEST).unwrap();
    let older = serde_json::to_string(&config).unwrap();
    let older = older.replace("\"protocol\":\"tcp\",", "").replace(",\"flows\":null", "");
    let older = older.replace(",\"policy\":\"Hash\"", "");
    assert!(!older.contains("protocol") && !older.contains("flows") && !older.contains("policy"), "{older}");
    assert_eq!(serde_json::from_str::<Config>(&older).unwrap(), config);
}
