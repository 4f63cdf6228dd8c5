//! Pictures of facts made up.

use std::collections::BTreeMap;

use reuseportd_sys::diag;
use reuseportd_wire::status::{Engine, Protocol};

use super::facts::{Facts, Listener, Owner, Running, UnixListener, Worker};
use super::picture::{Port, Relation, of};

fn socket(local: &str, inode: u32) -> diag::Socket {
    diag::Socket {
        state: diag::states::LISTEN,
        local: local.parse().unwrap(),
        remote: "0.0.0.0:0".parse().unwrap(),
        inode,
        cookie: u64::from(inode) + 1000,
        uid: 0,
        recv_queue: 3,
        send_queue: 128,
        drops: Some(0),
        v6only: local.starts_with('[').then_some(false),
    }
}

/// A master 1 with a worker 10 (child 11) of generation 2 that is steered to, and 20 of generation 1 that isn't.
fn facts(listen: &str, engine: Engine, sockets: &[(&str, i32)]) -> Facts {
    let worker = |generation, seat, is_steered_to, pids: &[i32]| Worker {
        generation,
        seat,
        is_steered_to,
        pids: pids.to_vec(),
    };
    let running = Running {
        app: "web".into(),
        master: 1,
        keeper: None,
        workers: vec![worker(1, 0, false, &[20]), worker(2, 5, true, &[10, 11])],
    };
    let owner = |pid| Owner { pid, command: format!("program {pid}") };
    let owners: BTreeMap<u64, Vec<Owner>> = (1..)
        .zip(sockets)
        .filter(|(_, (_, pid))| *pid > 0)
        .map(|(inode, (_, pid))| (inode, vec![owner(*pid)]))
        .collect();
    Facts {
        listeners: vec![Listener {
            name: "http".into(),
            protocol: Protocol::Tcp,
            address: listen.parse().unwrap(),
            engine: Some(engine),
        }],
        running: Some(running),
        unix: Vec::new(),
        no_master: None,
        sockets: (1..)
            .zip(sockets)
            .map(|(inode, (local, _))| (Protocol::Tcp, socket(local, inode)))
            .collect(),
        owners,
        unreadable: 0,
    }
}

fn only_port(facts: &Facts) -> Port {
    let mut picture = of(facts);
    assert_eq!(picture.ports.len(), 1);
    picture.ports.remove(0)
}

#[test]
fn each_socket_has_its_worker_children_included() {
    let all = [("0.0.0.0:80", 20), ("0.0.0.0:80", 11), ("0.0.0.0:80", 1)];
    let port = only_port(&facts("0.0.0.0:80", Engine::Ebpf, &all));
    let seen: Vec<_> =
        port.sockets.iter().map(|one| (one.relation, one.generation, one.seat, one.steered)).collect();
    let worker = |generation, seat, steered| (Relation::Worker, Some(generation), Some(seat), Some(steered));
    assert_eq!(seen, [worker(1, 0, false), worker(2, 5, true), (Relation::Master, None, None, None)]);
    assert_eq!((port.strangers, port.warnings.len()), (Some(0), 0));
    assert_eq!((port.sockets[0].accept_queue, port.sockets[0].backlog), (Some(3), Some(128)));
}

#[test]
fn a_stranger_in_the_group_is_named_with_its_effect() {
    for (engine, said, steered) in [(Engine::Ebpf, "never chosen", Some(false)), (Engine::Cbpf, "slot", None)]
    {
        let port = only_port(&facts("0.0.0.0:80", engine, &[("0.0.0.0:80", 10), ("0.0.0.0:80", 99)]));
        assert_eq!((port.sockets[1].relation, port.sockets[1].steered), (Relation::Stranger, steered));
        assert_eq!(port.strangers, Some(1));
        assert!(port.warnings[0].contains(said), "{:?}", port.warnings);
    }
}

#[test]
fn a_more_specific_address_takes_traffic_and_a_less_specific_does_not() {
    for (listen, other, takes) in [
        ("0.0.0.0:80", "127.0.0.1:80", true),
        ("[::]:80", "[::1]:80", true),
        ("[::]:80", "0.0.0.0:80", true),
        ("[::]:80", "127.0.0.1:80", true),
        ("127.0.0.1:80", "0.0.0.0:80", false),
        ("127.0.0.1:80", "127.0.0.2:80", false),
        ("0.0.0.0:80", "[::1]:80", false),
        ("0.0.0.0:80", "[::ffff:127.0.0.1]:80", true),
    ] {
        let port = only_port(&facts(listen, Engine::Ebpf, &[(listen, 10), (other, 99)]));
        assert_eq!(!port.sockets[1].takes_from.is_empty(), takes, "{other} beside {listen}");
        assert_eq!(port.warnings.iter().any(|warning| warning.contains("takes")), takes);
        assert_eq!((port.sockets[1].listener.as_deref(), port.strangers), (None, Some(1)));
    }
}

#[test]
fn from_a_listener_that_leaves_ipv4_alone_none_is_taken() {
    let mut only_v6 =
        facts("[::]:80", Engine::Ebpf, &[("[::]:80", 10), ("0.0.0.0:80", 99), ("[::1]:80", 99)]);
    only_v6.sockets[0].1.v6only = Some(true);
    let takes: Vec<bool> =
        only_port(&only_v6).sockets.iter().map(|socket| !socket.takes_from.is_empty()).collect();
    assert_eq!(takes, [false, false, true]);
}

#[test]
fn a_dual_stack_socket_of_a_worker_serves_the_ipv4_listener() {
    let port = only_port(&facts("0.0.0.0:80", Engine::Ebpf, &[("[::]:80", 10)]));
    assert_eq!((port.sockets[0].listener.as_deref(), port.warnings.len()), (Some("http"), 0));
    let port = only_port(&facts("0.0.0.0:80", Engine::Ebpf, &[("[::]:80", 99)]));
    assert_eq!(port.sockets[0].listener, None);
    assert!(port.warnings[0].contains("nobody listens"), "{:?}", port.warnings);
}

#[test]
fn what_cannot_be_seen_is_unknown_and_not_a_stranger() {
    let mut hidden = facts("0.0.0.0:80", Engine::Ebpf, &[("0.0.0.0:80", 10), ("0.0.0.0:80", 0)]);
    assert_eq!(only_port(&hidden).sockets[1].relation, Relation::Stranger, "nobody we can't see is left");
    hidden.unreadable = 7;
    let port = only_port(&hidden);
    assert_eq!((port.sockets[1].relation, port.strangers), (Relation::Unknown, None));
    assert!(port.sockets[1].owners.is_none() && port.sockets[0].owners.is_some());
    hidden.running = None;
    assert_eq!(only_port(&hidden).sockets[0].relation, Relation::Unknown, "no master to ask");
}

#[test]
fn udp_has_a_port_of_its_own_and_a_queue_in_bytes() {
    let mut both = facts("0.0.0.0:80", Engine::Ebpf, &[("0.0.0.0:80", 10), ("0.0.0.0:80", 20)]);
    both.sockets[1].0 = Protocol::Udp;
    let udp = Listener { name: "dns".into(), protocol: Protocol::Udp, ..both.listeners.pop().unwrap() };
    both.listeners.push(udp);
    let port = only_port(&both);
    assert_eq!((port.protocol, port.sockets.len(), port.warnings.len()), (Protocol::Udp, 1, 0));
    let socket = &port.sockets[0];
    assert_eq!((socket.accept_queue, socket.backlog, socket.receive_queue), (None, None, Some(3)));
    assert_eq!((socket.generation, socket.seat), (Some(1), Some(0)));
}

#[test]
fn a_shared_socket_is_nobodys_in_particular() {
    let mut shared = facts("0.0.0.0:80", Engine::None, &[("0.0.0.0:80", 10)]);
    let also = Owner { pid: 20, command: "program 20".into() };
    shared.owners.get_mut(&1).unwrap().push(also);
    let socket = &only_port(&shared).sockets[0];
    assert_eq!((socket.relation, socket.workers, socket.generation), (Relation::Worker, 2, None));
    let path = |listening| UnixListener { name: "web".into(), path: "/x".into(), listening, waiting: 4 };
    shared.unix = vec![path(vec![1]), path(Vec::new())];
    let unix = of(&shared).unix;
    assert_eq!((unix[0].sockets[0].workers, unix[0].accept_queue, unix[0].warnings.len()), (2, 4, 0));
    assert!(unix[1].warnings[0].contains("nobody listens"), "{:?}", unix[1].warnings);
}
