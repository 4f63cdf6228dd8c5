use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use crate::channel::{ChannelError, DATAGRAM_BYTES_MAX, FromWorker, LISTENERS_MAX, ToWorker};
use crate::control::{
    ControlError, REQUEST_BYTES_MAX, Reply, Request, Wait, decode_reply, decode_request, encode,
};
use crate::env::{UnixListen, format_listen, parse_listen, parse_unix_listen};
use crate::status::{MasterState, Phase, Status};

/// splitmix64: a seed means the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn name(&mut self, bytes_max: usize) -> String {
        const ALLOWED: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789_-";
        let length = 1 + self.below(bytes_max);
        (0..length).map(|_| char::from(ALLOWED[self.below(ALLOWED.len())])).collect()
    }
}

fn from_worker(random: &mut Random) -> FromWorker {
    match random.below(5) {
        0 => {
            let count = 1 + random.below(LISTENERS_MAX);
            FromWorker::Ready((0..count).map(|_| random.name(64)).collect())
        }
        1 => FromWorker::Drained,
        2 => FromWorker::Taken { name: random.name(64), count: u32::try_from(random.next() >> 32).unwrap() },
        3 => FromWorker::Error(format!("can't open {}: käse  ", random.name(20))),
        _ => FromWorker::Unknown(random.name(64)),
    }
}

fn to_worker(random: &mut Random) -> ToWorker {
    match random.below(4) {
        0 => ToWorker::Serve,
        1 => ToWorker::Stop,
        2 => ToWorker::Take(random.name(64)),
        _ => ToWorker::Unknown(random.name(64)),
    }
}

#[test]
fn channel_messages_come_back_as_they_went() {
    let mut random = Random(1);
    for _ in 0..2_000 {
        let message = from_worker(&mut random);
        assert_eq!(FromWorker::decode(message.encode().unwrap().as_bytes()), Ok(message));
        let message = to_worker(&mut random);
        assert_eq!(ToWorker::decode(message.encode().unwrap().as_bytes()), Ok(message));
    }
}

#[test]
fn the_documented_datagrams_are_the_encoded_ones() {
    let ready = FromWorker::Ready(vec!["http".to_owned(), "admin".to_owned()]);
    assert_eq!(ready.encode().unwrap(), "ready http admin");
    let taken = FromWorker::Taken { name: "http".to_owned(), count: 12 };
    assert_eq!(taken.encode().unwrap(), "taken http 12");
    assert_eq!(ToWorker::Take("http".to_owned()).encode().unwrap(), "take http");
    assert_eq!(ToWorker::Unknown("dance".to_owned()).encode().unwrap(), "unknown dance");
}

#[test]
fn garbage_and_truncated_datagrams_are_errors_or_other_messages_but_never_a_panic() {
    let mut random = Random(2);
    for _ in 0..20_000 {
        let mut datagram = match random.below(3) {
            0 => (0..random.below(80)).map(|_| u8::try_from(random.below(256)).unwrap()).collect(),
            1 => from_worker(&mut random).encode().unwrap().into_bytes(),
            _ => to_worker(&mut random).encode().unwrap().into_bytes(),
        };
        datagram.truncate(random.below(datagram.len() + 1));
        for _ in 0..random.below(3).min(datagram.len()) {
            let at = random.below(datagram.len());
            datagram[at] = u8::try_from(random.below(256)).unwrap();
        }
        // What was understood can be said again and means the same.
        if let Ok(message) = FromWorker::decode(&datagram) {
            assert_eq!(FromWorker::decode(message.encode().unwrap().as_bytes()), Ok(message));
        }
        if let Ok(message) = ToWorker::decode(&datagram) {
            assert_eq!(ToWorker::decode(message.encode().unwrap().as_bytes()), Ok(message));
        }
    }
}

#[test]
fn unknown_verbs_can_be_answered_and_later_words_are_ignored() {
    let unknown = ChannelError::UnknownVerb("dance".to_owned());
    assert_eq!(ToWorker::decode(b"dance slowly"), Err(unknown.clone()));
    assert_eq!(FromWorker::decode(b"dance slowly"), Err(unknown));
    assert_eq!(ToWorker::decode(b"serve since=7"), Ok(ToWorker::Serve));
    assert_eq!(ToWorker::decode(b"take http fast"), Ok(ToWorker::Take("http".to_owned())));
}

#[test]
fn words_of_the_wrong_form_are_refused() {
    for datagram in ["ready", "ready HTTP", "ready http  admin", "taken http", "taken http -1", "unknown"] {
        let refused = FromWorker::decode(datagram.as_bytes());
        assert!(matches!(refused, Err(ChannelError::Malformed { .. })), "{datagram}: {refused:?}");
    }
    for datagram in [&b""[..], b" serve", b"SERVE", b"serve\n", b"\xff\xfe"] {
        assert_eq!(ToWorker::decode(datagram), Err(ChannelError::NotText), "{datagram:?}");
    }
    let many = FromWorker::Ready(vec!["http".to_owned(); LISTENERS_MAX + 1]);
    assert!(matches!(many.encode(), Err(ChannelError::Malformed { verb: "ready", .. })));
    assert!(ToWorker::Take("No".to_owned()).encode().is_err());
}

#[test]
fn oversize_is_refused_and_a_long_error_is_cut() {
    let long = vec![b'a'; DATAGRAM_BYTES_MAX + 1];
    let refused = Err(ChannelError::TooLong { bytes: DATAGRAM_BYTES_MAX + 1 });
    assert_eq!(FromWorker::decode(&long), refused);
    let datagram = FromWorker::Error("ä\n".repeat(DATAGRAM_BYTES_MAX)).encode().unwrap();
    assert!(datagram.len() <= DATAGRAM_BYTES_MAX && datagram.len() > DATAGRAM_BYTES_MAX - 4);
    assert!(datagram.starts_with("error ä ä"), "control characters become spaces");
    let names = FromWorker::Ready(vec!["n".repeat(64); LISTENERS_MAX]).encode().unwrap();
    assert!(names.len() <= DATAGRAM_BYTES_MAX);
}

#[test]
fn requests_read_as_documented() {
    let read = |text: &str| decode_request(text.as_bytes());
    assert_eq!(read(r#"{"command":"status"}"#).unwrap(), Request::Status {});
    assert_eq!(
        read("{\"command\":\"upgrade\"}\n").unwrap(),
        Request::Upgrade { wait: Wait::None, force: false }
    );
    let drained = read(r#"{"command":"upgrade","wait":"drained"}"#).unwrap();
    assert_eq!(drained, Request::Upgrade { wait: Wait::Drained, force: false });
    assert_eq!(read(r#"{"command":"stop","wait":true}"#).unwrap(), Request::Stop { wait: true });
    assert_eq!(encode(&Request::Status {}).unwrap(), "{\"command\":\"status\"}\n");
    for refused in [
        r#"{"command":"dance"}"#,
        r#"{"command":"status","x":1}"#,
        r#"{"command":"stop","force":true}"#,
        r#"{"wait":true}"#,
        r#"{"command":"upgrade","wait":true}"#,
        "[]",
        "",
        "{\"command\":\"status\"} x",
    ] {
        assert!(matches!(read(refused), Err(ControlError::Json(_))), "{refused}");
    }
    let long = " ".repeat(REQUEST_BYTES_MAX + 1);
    assert!(matches!(read(&long), Err(ControlError::TooLong { .. })));
}

#[test]
fn replies_read_as_documented() {
    let progress = Reply::Progress {
        state: Phase::Launching,
        text: "3 of 4 ready".to_owned(),
        ready: Some(3),
        of: Some(4),
    };
    let line = r#"{"reply":"progress","state":"launching","text":"3 of 4 ready","ready":3,"of":4}"#;
    assert_eq!(encode(&progress).unwrap(), format!("{line}\n"));
    let accepted = decode_reply(br#"{"reply":"accepted"}"#).unwrap();
    assert!(accepted.is_last(false) && !accepted.is_last(true) && !progress.is_last(true));
    let error = decode_reply(br#"{"reply":"error","message":"no","since":1}"#).unwrap();
    assert!(error.is_last(true));
}

/// The example of the contract, as it stands there but for the shortened texts.
const STATUS: &str = r#"{"app":"web","state":"steady","master":{"pid":1,"version":"0.1.0","started_at":"RFC 3339","reexecs":0,"adopted":false},
 "active_generation":4,
 "generations":[{"generation":4,"state":"active","share":1.0,"executable":{"path":"…","inode":1,"sha256":"…"},"connections":12,
   "workers":[{"seat":0,"pid":123,"state":"serving","restarts":0,"started_at":"…","status":"text from STATUS=",
     "listeners":[{"name":"http","accept_queue":0,"backlog":4096}]}]}],
 "listeners":[{"name":"http","address":"0.0.0.0:8080","protocol":"tcp","bind":"worker","engine":"ebpf","engine_reason":"…","strangers":0}],
 "last_upgrade":{"from":3,"to":4,"trigger":"signal","outcome":"completed","reason":null,"started_at":"…","duration_ms":812,
   "phases":[{"phase":"launching","ms":640}],
   "listeners":[{"name":"http","queued_at_switch":3,"half_open_at_switch":1,"migrated":0,"migrate_failures":0,"listen_drops":0}],
   "forced_kills":0,"connections_cut":0}}"#;

#[test]
fn status_has_every_field_of_the_contract_under_its_name() {
    let mut status: Status = serde_json::from_str(STATUS).unwrap();
    assert_eq!(status.state, MasterState::Steady);
    let ours = serde_json::to_value(&status).unwrap();
    let contract: serde_json::Value = serde_json::from_str(STATUS).unwrap();
    contains(&ours, &contract, "status");
    status.generations[0].connections = None;
    let line = encode(&Reply::Status { status: status.into() }).unwrap();
    assert!(line.contains(r#""connections":null"#), "unknown is null");
    assert_eq!(line.matches('\n').count(), 1);
    assert!(matches!(decode_reply(line.as_bytes()), Ok(Reply::Status { .. })));
}

fn contains(ours: &serde_json::Value, contract: &serde_json::Value, path: &str) {
    use serde_json::Value::{Array, Object};
    match (ours, contract) {
        (Object(ours), Object(contract)) => {
            for (key, value) in contract {
                contains(&ours[key], value, &format!("{path}.{key}"));
            }
        }
        (Array(ours), Array(contract)) => {
            assert_eq!(ours.len(), contract.len(), "{path}");
            ours.iter().zip(contract).for_each(|(ours, contract)| contains(ours, contract, path));
        }
        _ => assert_eq!(ours, contract, "{path}"),
    }
}

#[test]
fn states_are_the_words_of_the_contract() {
    let word = |state: MasterState| (serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
    let (json, shown) = word(MasterState::RollingBack);
    assert_eq!((json.as_str(), shown.as_str()), ("\"rolling_back\"", "\"rolling_back\""));
    assert_eq!(format!("{:>8}|", Phase::Canary), "  canary|");
}

#[test]
fn listen_variable_reads_as_documented() {
    let value = "http=tcp:0.0.0.0:8080;admin=tcp:[::]:9000;dns=udp:127.0.0.1:53";
    let listeners = parse_listen(value).unwrap();
    assert_eq!(listeners.iter().map(|l| l.address.port()).collect::<Vec<_>>(), [8080, 9000, 53]);
    assert_eq!(format_listen(&listeners), value);
    assert_eq!(parse_listen("").unwrap(), []);
    // What is passed and not bound is passed over.
    let both = format!("{value};web=unix:/run/web.sock");
    assert_eq!(parse_listen(&both).unwrap(), listeners);
    let web = UnixListen { name: "web".into(), path: "/run/web.sock".into() };
    assert_eq!(web.to_string(), "web=unix:/run/web.sock");
    assert_eq!(parse_unix_listen(&both).unwrap(), [web]);
    for part in [
        "http",
        "http=0.0.0.0:80",
        "http=tcp:80",
        "=tcp:1.2.3.4:5",
        "a b=tcp:1.2.3.4:5",
        "x=sctp:1.2.3.4:5",
        "x=unix:y",
    ] {
        let error = parse_listen(&format!("ok=tcp:1.2.3.4:5;{part}")).unwrap_err();
        assert_eq!(error.part, part);
        assert!(error.to_string().contains(part));
    }
}

#[test]
fn a_notification_is_a_line_of_those_that_mean_something() {
    use crate::notify::{Notification, decode};
    use core::time::Duration;
    let said =
        decode(b"READY=1\nSTATUS=a=b\xff\r\nMAINPID=7\nEXTEND_TIMEOUT_USEC=5\nWATCHDOG=1\nWATCHDOG=trigger");
    let wanted = [
        Notification::Ready,
        Notification::Status("a=b\u{fffd}".to_owned()),
        Notification::Extend(Duration::from_micros(5)),
        Notification::Alive,
        Notification::Stuck,
    ];
    assert_eq!(said, wanted);
    for nothing in
        [&b""[..], b"READY", b"READY=0", b"ready=1", b"EXTEND_TIMEOUT_USEC=-1", b"WATCHDOG=", b"=\n="]
    {
        assert_eq!(decode(nothing), [], "{nothing:?}");
    }
}
