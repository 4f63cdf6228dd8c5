//! Handshakes that are unfinished when new connections go elsewhere, and groups that shrink.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::support::app::App;
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::world::{Need, World, needs_of, tool, world};
use crate::support::{PATIENCE, rounds};

/// 200 clients that finish their handshake, in the kernel's eyes, with their first word: after 0.2 to 0.6 s.
fn silent_clients_lose_nothing(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let load = || spec(world).half_open(200).rate(50.0);
        let master = Master::start(world, &deferring(world, mode, engine));
        let running = Load::start(load());
        let upgrades = rounds(3, 6);
        for generation in 2..=upgrades + 1 {
            master.hup();
            running.answered_by(generation);
        }
        let report = running.end_lossless();
        let receipt = master.status().last_upgrade.expect("an upgrade was made");
        let half_open = receipt.listeners[0].half_open_at_switch;
        assert!(half_open.is_some_and(|count| count > 20), "too few half open: {receipt:#?} {report}");
        assert_eq!(receipt.listeners[0].half_open_abandoned, Some(0), "{receipt:#?}");
        master.stop();

        let control = Master::start(world, &naive(deferring(world, "naive", "none")));
        let running = Load::start(load());
        control.hup();
        running.answered(100);
        let report = running.end();
        assert!(report.lost() > 0, "the load shows nothing: {report}");
        control.stop();
    });
}

fn deferring(world: &World, mode: &str, engine: &'static str) -> App {
    App::test_worker(world, &format!("--mode {mode} --defer-accept")).engine(engine).upgrade(PATIENT)
}

/// Begun handshakes are waited for as long as a loaded machine may need.
const PATIENT: &str = "settle_timeout = \"25s\"";

/// Stops the old workers at once, as if begun handshakes did not exist.
fn naive(mut app: App) -> App {
    app.upgrade.clear();
    app.upgrade("stop_when = \"drained\"")
        .upgrade("settle_timeout = \"1ms\"")
        .upgrade("drain_timeout = \"1s\"")
}

#[test]
fn silent_clients_sdk_ebpf() {
    silent_clients_lose_nothing("ebpf", "sdk");
}

#[test]
fn silent_clients_sdk_cbpf() {
    silent_clients_lose_nothing("cbpf", "sdk");
}

#[test]
fn silent_clients_unmodified_ebpf() {
    silent_clients_lose_nothing("ebpf", "plain");
}

#[test]
fn silent_clients_unmodified_cbpf() {
    silent_clients_lose_nothing("cbpf", "plain");
}

/// Handshakes whose last ACK is on its way while the generations change.
const HELD: usize = 100;

/// The packet filter holds back what these clients send, except their SYN.
const HELD_SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);

fn hold_acks() {
    tool("nft add table ip held");
    tool("nft add chain ip held out { type filter hook output priority 0 ; }");
    tool(&format!("nft add rule ip held out ip saddr {HELD_SOURCE} tcp flags & (syn|ack) == ack drop"));
}

/// From the client's side the connection exists when the SYN is answered; the server waits for the ACK.
fn half_open(target: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((HELD_SOURCE, 0)).into()).unwrap();
    socket.connect_timeout(&target.into(), PATIENCE).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"held\n").unwrap();
    stream
}

/// How many of the held clients are answered in the end.
fn answered_of_held(world: &World, app: &App) -> usize {
    let master = Master::start(world, app);
    hold_acks();
    let held: Vec<TcpStream> = (0..HELD).map(|_| half_open(world.address)).collect();
    let lift = Instant::now() + Duration::from_millis(600);
    master.signal(rustix::process::Signal::HUP);
    // Nothing is to be seen from outside until then: the reload may end before, if begun handshakes are not waited for.
    master.upstream.wait(master.upstream.mark(), "never", lift.saturating_duration_since(Instant::now()));
    tool("nft delete table ip held");
    let answered = held.into_iter().filter_map(|mut client| {
        let mut answer = String::new();
        client.read_to_string(&mut answer).ok().filter(|_| answer.contains("generation="))
    });
    let answered = answered.count();
    master.stop();
    answered
}

fn held_handshakes_are_answered(engine: &'static str, mode: &str) {
    world(&[Need::Root, Need::Bpf, Need::Nft], |world| {
        let app = |mode: &str, engine| App::test_worker(world, &format!("--mode {mode}")).engine(engine);
        assert_eq!(answered_of_held(world, &app(mode, engine).upgrade(PATIENT)), HELD);
        let control = answered_of_held(world, &naive(app("naive", "none")));
        assert!(control < HELD, "the test shows nothing: the naive control answers all");
    });
}

#[test]
fn held_handshakes_sdk_ebpf() {
    held_handshakes_are_answered("ebpf", "sdk");
}

#[test]
fn held_handshakes_sdk_cbpf() {
    held_handshakes_are_answered("cbpf", "sdk");
}

#[test]
fn held_handshakes_unmodified_ebpf() {
    held_handshakes_are_answered("ebpf", "plain");
}

#[test]
fn held_handshakes_unmodified_cbpf() {
    held_handshakes_are_answered("cbpf", "plain");
}

/// Fewer listeners after the upgrade than before: whatever went by numbers or hashes goes astray here.
fn worker_counts_change(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        // One worker takes 200 a second, and in the end there is but one.
        let load = || spec(world).rate(50.0).burst(30, Duration::from_millis(300)).slow(10);
        let app = |mode: &str| App::test_worker(world, &format!("--mode {mode} --accept-delay 5"));
        let mut changing = app(mode).engine(engine).workers(6);
        let master = Master::start(world, &changing);
        let running = Load::start(load());
        for (generation, workers) in (2..).zip([2, 5, 1]) {
            changing.workers = workers;
            changing.write();
            master.hup();
            running.answered_by(generation);
            assert_eq!(master.serving().len(), workers as usize);
        }
        running.end_lossless();
        master.stop();

        let mut shrinking = naive(app("naive").engine("none")).workers(6);
        let control = Master::start(world, &shrinking);
        let running = Load::start(slow_accepts(world));
        shrinking.workers = 4;
        shrinking.write();
        control.hup();
        running.answered(100);
        let report = running.end();
        assert!(report.lost() > 0, "the load shows nothing: {report}");
        control.stop();
    });
}

#[test]
fn worker_counts_sdk_ebpf() {
    worker_counts_change("ebpf", "sdk");
}

#[test]
fn worker_counts_sdk_cbpf() {
    worker_counts_change("cbpf", "sdk");
}

#[test]
fn worker_counts_unmodified_ebpf() {
    worker_counts_change("ebpf", "plain");
}

#[test]
fn worker_counts_unmodified_cbpf() {
    worker_counts_change("cbpf", "plain");
}
