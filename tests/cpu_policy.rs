//! `policy = "cpu"`: who comes in on a processor is served by its seat. On the loopback what is sent comes in on the
//! processor of the sender.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::Master;
use crate::support::process::signal;
use crate::support::world::{Need, needs_of, world};

/// Clients of each processor.
const CLIENTS: u32 = 100;

/// The processors a client can be on.
fn processors() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap()).collect()
}

/// The seat that answers a client, by TCP.
fn connect(address: SocketAddr) -> u32 {
    let mut client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"who\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let seat = answer.split("seat=").nth(1).and_then(|rest| rest.split(' ').next());
    seat.and_then(|seat| seat.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

/// By UDP.
fn ask(address: SocketAddr) -> u32 {
    let client = UdpSocket::bind((address.ip(), 0)).unwrap();
    client.connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send(b"who").unwrap();
    let mut answer = [0; 64];
    let length = client.recv(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    answer.split(' ').nth(1).and_then(|seat| seat.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

/// The seats that answer the clients of each processor.
fn seats(address: SocketAddr, client: fn(SocketAddr) -> u32) -> Vec<(usize, BTreeSet<u32>)> {
    let on = move |cpu: usize| {
        let mut only = CpuSet::new();
        only.set(cpu).unwrap();
        sched_setaffinity(Pid::from_raw(0), &only).unwrap();
        (0..CLIENTS).map(|_| client(address)).collect()
    };
    let measure = move |cpu: usize| (cpu, thread::spawn(move || on(cpu)));
    let all: Vec<_> = processors().into_iter().map(measure).collect();
    all.into_iter().map(|(cpu, thread)| (cpu, thread.join().unwrap())).collect()
}

struct Service {
    engine: &'static str,
    mode: &'static str,
    workers: u32,
    protocol: &'static str,
    client: fn(SocketAddr) -> u32,
}

impl Service {
    fn app(&self, world: &crate::support::world::World) -> App {
        App::test_worker(world, &format!("--mode {}", self.mode))
            .engine(self.engine)
            .workers(self.workers)
            .app("cpu_affinity = \"seat\"")
            .listen(self.protocol)
    }

    /// Each processor's clients are all answered by its seat.
    fn is_so(&self, all: &[(usize, BTreeSet<u32>)]) -> bool {
        let seat = |cpu: &usize| u32::try_from(*cpu).unwrap() % self.workers;
        all.iter().all(|(cpu, seats)| seats.iter().eq([&seat(cpu)]))
    }

    /// At once, or before long: while sockets leave or join, others may stand in for a seat.
    fn demand(&self, address: SocketAddr, when: &str, at_once: bool) {
        let deadline = Instant::now() + if at_once { Duration::ZERO } else { PATIENCE };
        loop {
            let all = seats(address, self.client);
            if self.is_so(&all) {
                return;
            }
            assert!(Instant::now() < deadline, "{when}: {all:?}");
        }
    }
}

fn its_seat_serves(engine: &'static str, protocol: &'static str, client: fn(SocketAddr) -> u32) {
    world(&[needs_of(engine), &[Need::Root]].concat(), |world| {
        assert!(processors().len() > 1, "one processor shows nothing");
        for (mode, workers) in [("sdk", 2), ("plain", 4)] {
            let service = Service { engine, mode, workers, protocol, client };
            let app = service.app(world);
            let master = Master::start(world, &app.clone().steering("policy = \"cpu\""));
            service.demand(world.address, "at first", true);
            assert_eq!(master.upgrade().to, Some(2));
            service.demand(world.address, "after an upgrade", engine == "ebpf");
            // The highest first: its slot is taken by another.
            for seat in [1, 0] {
                let before = master.serving();
                signal(before[seat], Signal::KILL);
                master.wait_status("respawned", |_| {
                    let now = master.serving();
                    now.len() == before.len() && !now.contains(&before[seat])
                });
                service.demand(world.address, "after a respawn", false);
            }
            master.stop();

            // By hash they come to all of them, whatever processor they are on.
            let master = Master::start(world, &app);
            let all = seats(world.address, client);
            assert!(all.iter().all(|(_, seats)| seats.iter().copied().eq(0..workers)), "{all:?}");
            master.stop();
        }
    });
}

#[test]
fn its_seat_serves_tcp_ebpf() {
    its_seat_serves("ebpf", "protocol = \"tcp\"", connect);
}

#[test]
fn its_seat_serves_tcp_cbpf() {
    its_seat_serves("cbpf", "protocol = \"tcp\"", connect);
}

#[test]
fn its_seat_serves_udp_ebpf() {
    its_seat_serves("ebpf", "protocol = \"udp\"", ask);
}

#[test]
fn its_seat_serves_udp_cbpf() {
    its_seat_serves("cbpf", "protocol = \"udp\"", ask);
}
