//! Ports that somebody else has, and listeners that their workers let go.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use reuseportd_wire::status::{Outcome as Upgraded, Status};
use socket2::{Domain, Socket, Type};

use super::descriptors::{comes_to_nothing, recovers, slow_workers};
use super::{Fault, Outcome, under_load};
use crate::crash::{one_at_a_time, queues_of_twenty};
use crate::stranger::stranger;
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::slow_accepts;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::wait_gone;
use crate::support::watch;
use crate::support::world::{Need, World};
use crate::unprivileged::{UID, installed};
use crate::watchdog::restarts;

#[test]
fn a_stranger_joins() {
    under_load(
        &Fault {
            name: "port taken with SO_REUSEPORT by the same user",
            when: "a stranger listens on our address and never accepts; then upgrades",
            then: "it is in the group and never chosen; status counts it as a stranger",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let master = Master::start(world, &slow_workers(world, engine));
            let load = load();
            let stranger = stranger(world);
            master.wait_status("a stranger", |status| status.listeners[0].strangers == Some(1));
            master.upgrade();
            load.answered_by(2);
            let outcome = recovers(master, load);
            let accepted = stranger.accept().map_err(|error| error.kind());
            // What came between its listen() and the next switch was steered by key, not by chance.
            assert!(matches!(accepted, Err(ErrorKind::WouldBlock)), "the stranger was chosen: {accepted:?}");
            outcome
        },
    );
}

/// Ends with the test.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Who holds the port, until dropped.
enum Holder {
    Alone { _listener: TcpListener },
    OtherUser { _process: Other },
}

fn alone(address: SocketAddr) -> Holder {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(16).unwrap();
    Holder::Alone { _listener: socket.into() }
}

/// With SO_REUSEPORT, which helps only among sockets of one user.
fn other_user(world: &World, address: SocketAddr) -> Holder {
    let (_, worker) = installed(world);
    let mut command = Command::new(worker);
    command
        .args(["--mode", "plain", "--listen", &format!("default=tcp:{address}")])
        .uid(UID + 1)
        .gid(UID + 1);
    let process = Other(command.spawn().unwrap());
    let deadline = std::time::Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_err() {
        assert!(std::time::Instant::now() < deadline, "it does not listen");
    }
    Holder::OtherUser { _process: process }
}

fn second(world: &World) -> SocketAddr {
    let mut address = world.address;
    address.set_port(address.port() + 1);
    address
}

/// At the start of a service, and in an upgrade that adds a listener.
fn cannot_join(fault: &Fault, hold: fn(&World, SocketAddr) -> Holder) {
    under_load(fault, &[Need::Root], &["ebpf", "cbpf"], slow_accepts, |world, engine, load| {
        let first = slow_workers(world, engine);
        let passed = App::test_worker(world, "--mode activated --accept-delay 5").engine(engine);
        for app in [first.clone(), passed.clone()] {
            let holder = hold(world, world.address);
            let mut master = Master::launch(world, &app, Command::new(REUSEPORTD));
            assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
            let log = master.log();
            assert!(log.contains("in use"), "{log}");
            drop(holder);
        }
        let master = Master::start(world, &first);
        let load = load();
        let holder = hold(world, second(world));
        for mut app in [first, passed] {
            app.listen.push(("more".into(), second(world)));
            app.write();
            comes_to_nothing(&master, Upgraded::RolledBack, &["in use"]);
        }
        drop(holder);
        recovers(master, load)
    });
}

#[test]
fn the_port_is_taken() {
    cannot_join(
        &Fault {
            name: "port taken without SO_REUSEPORT: EADDRINUSE",
            when: "start; upgrade that adds a listener",
            then: "the start fails with status 1, the upgrade is rolled back; both give the error: of a worker that binds itself its last words",
            lost: "",
        },
        |_, address| alone(address),
    );
}

#[test]
fn the_port_is_taken_by_another_user() {
    cannot_join(
        &Fault {
            name: "port taken with SO_REUSEPORT by another user: EADDRINUSE",
            when: "start; upgrade that adds a listener",
            then: "the start fails with status 1, the upgrade is rolled back; both give the error: of a worker that binds itself its last words",
            lost: "",
        },
        other_user,
    );
}

#[test]
fn a_more_specific_address() {
    under_load(
        &Fault {
            name: "a stranger on a more specific address",
            when: "we serve 0.0.0.0, it listens on 127.0.0.9 of the same port; an upgrade",
            then: "the kernel gives it what comes to that address; `reuseportd sockets` shows it as overlapping",
            lost: "what comes to that address as long as it is there; all others are served",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let mut app = slow_workers(world, engine);
            let port = world.address.port();
            app.listen[0].1 = SocketAddr::from(([0, 0, 0, 0], port));
            let master = Master::start(world, &app);
            let load = load();
            let theirs = SocketAddr::from(([127, 0, 0, 9], port));
            let holder = {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.set_reuse_port(true).unwrap();
                socket.bind(&theirs.into()).unwrap();
                socket.listen(16).unwrap();
                TcpListener::from(socket)
            };
            let _client = TcpStream::connect(theirs).unwrap();
            holder.accept().expect("it is theirs");
            let sockets = master.cli("sockets");
            assert!(sockets.code == 0 && sockets.stdout.contains("127.0.0.9"), "{sockets:?}");
            master.upgrade();
            load.answered_by(2);
            drop(holder);
            assert!(ask(theirs, "hello").contains("generation=2"), "ours again");
            recovers(master, load)
        },
    );
}

fn ask(address: SocketAddr, line: &str) -> String {
    let mut client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// A worker does this to its listener, and lives on.
fn lets_go(fault: &Fault, mode: &str, how: &str) {
    under_load(fault, &[], &["ebpf", "cbpf"], queues_of_twenty, |world, engine, load| {
        let app = one_at_a_time(world, mode, engine);
        let master = Master::start(world, &app);
        let load = load();
        let answer = ask(world.address, how);
        let pid = answer.split("pid=").nth(1).expect("who it was").trim().parse().unwrap();
        let is_replaced = |status: &Status| restarts(status) == 1 && watch::serving(status).count() == 4;
        master.wait_status("replaced", is_replaced);
        wait_gone(pid, PATIENCE);
        assert!(!master.serving().contains(&pid));
        load.answered(300);
        let counted = master.counted_losses();
        let outcome = recovers(master, load);
        eprintln!("{how}, {mode}, {engine}: {counted} counted, {}", outcome.report);
        let excused = match (engine, how) {
            // What the kernel itself has reset nobody can count: it is a queue, and what comes to a seat in a second.
            ("cbpf", "shutdown") => 250,
            _ if fault.lost.is_empty() => 0,
            _ => counted,
        };
        Outcome { excused, ..outcome }
    });
}

const REPLACED: &str = "within two seconds the log says so, and the worker is replaced";

#[test]
fn a_plain_worker_closes_its_listener() {
    lets_go(
        &Fault {
            name: "a worker closes its listener unasked and lives on",
            when: "plain worker, siblings serve",
            then: REPLACED,
            lost: "under cbpf what waited in its queue, which is counted; under ebpf the kernel moves it to siblings",
        },
        "plain",
        "close",
    );
}

#[test]
fn an_activated_worker_closes_its_listener() {
    lets_go(
        &Fault {
            name: "a worker closes its listener unasked and lives on",
            when: "worker with a socket of the master, siblings serve",
            then: "within two seconds the log says so, and the worker is replaced; the next one has the same socket and its queue",
            lost: "",
        },
        "activated",
        "close",
    );
}

#[test]
fn a_plain_worker_shuts_its_listener_down() {
    lets_go(
        &Fault {
            name: "a worker shuts its listener down (shutdown(2)) and lives on",
            when: "plain worker, siblings serve",
            then: REPLACED,
            lost: "under cbpf what waited there, and what its slot is chosen for until the master knows: the kernel resets it",
        },
        "plain",
        "shutdown",
    );
}

#[test]
fn an_activated_worker_shuts_its_listener_down() {
    lets_go(
        &Fault {
            name: "a worker shuts its listener down (shutdown(2)) and lives on",
            when: "worker with a socket of the master, siblings serve",
            then: "within two seconds the log says so; worker and socket are replaced",
            lost: "under cbpf what waited there, and what its slot is chosen for until the master knows: the kernel resets it",
        },
        "activated",
        "shutdown",
    );
}

#[test]
fn a_handover_worker_shuts_its_listener_down() {
    lets_go(
        &Fault {
            name: "a worker shuts its listener down (shutdown(2)) and lives on",
            when: "handover worker, siblings serve",
            then: "the worker says so at once, and is replaced",
            lost: "under cbpf what waited there, and what its slot is chosen for until the master knows: the kernel resets it",
        },
        "sdk",
        "shutdown",
    );
}
