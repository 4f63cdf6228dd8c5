//! UDP workers without a master: they answer everything, and what waits when they are told to stop as well.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::test_worker;
use crate::support::flows::{Flows, spec};
use crate::support::process::{signal, wait};
use crate::support::world::{Need, World, example, repository, world};

const WAITING: usize = 40;
/// How long nothing must come for nothing to be on its way any more.
const SILENCE: Duration = Duration::from_millis(200);

/// A worker that ends with the test.
struct Worker(Child);

impl Worker {
    fn start(world: &World, words: &[String]) -> Worker {
        let mut command = Command::new(&words[0]);
        let listen = format!("udp=udp:{0};tcp=tcp:{0}", world.address);
        let child = command.args(&words[1..]).env("REUSEPORTD_LISTEN", listen).spawn().unwrap();
        let worker = Worker(child);
        wait_answered(world.address);
        worker
    }

    /// Stops it by SIGTERM with datagrams in its socket; how many are answered, and its exit code.
    fn terminate(&mut self, address: SocketAddr) -> (usize, Option<i32>) {
        let pid = self.0.id();
        signal(pid, Signal::STOP);
        wait_halted(pid);
        let client = client(address);
        for number in 0..WAITING {
            client.send(number.to_string().as_bytes()).unwrap();
        }
        signal(pid, Signal::TERM);
        signal(pid, Signal::CONT);
        let code = wait(&mut self.0, PATIENCE).expect("it ends").code();
        client.set_read_timeout(Some(SILENCE)).unwrap();
        let ask = || match client.recv(&mut [0; 64]) {
            Ok(_) => Some(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        };
        (std::iter::from_fn(ask).count(), code)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn client(address: SocketAddr) -> UdpSocket {
    let client = UdpSocket::bind((address.ip(), 0)).unwrap();
    client.connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// Waits until somebody answers.
fn wait_answered(address: SocketAddr) {
    let (client, deadline) = (client(address), Instant::now() + PATIENCE);
    loop {
        let answered = client.send(b"hello").and_then(|_| client.recv(&mut [0; 64]));
        match answered {
            Ok(_) => return,
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
        assert!(Instant::now() < deadline, "nobody answers on {address}");
        thread::yield_now();
    }
}

/// Waits until SIGSTOP has reached every thread.
pub(crate) fn wait_halted(pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    let is_halted = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    };
    while !fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().all(is_halted) {
        assert!(Instant::now() < deadline, "process {pid} goes on");
        thread::yield_now();
    }
}

fn programs(world: &World) -> [Vec<String>; 3] {
    let python = ["python3".to_owned(), repository("examples/udp_echo.py").display().to_string()];
    let udp_echo = vec![example("udp_echo").display().to_string()];
    let python = [&python[..], &[world.address.port().to_string()]].concat();
    [udp_echo, python, test_worker("--mode sdk")]
}

#[test]
fn every_datagram_is_answered() {
    world(&[Need::Python], |world| {
        for words in programs(world) {
            let worker = Worker::start(world, &words);
            let flows = Flows::start(spec(world).flows(20).rate(1000.0).new_flows(50.0));
            let beside = flows.beside(spec(world).flows(5).rate(200.0));
            flows.answered_by(0);
            flows.answered(300);
            for report in [beside.end_lossless(), flows.end_lossless()] {
                assert!(
                    report
                        .flows
                        .iter()
                        .flat_map(|flow| &flow.spans)
                        .all(|span| span.who.pid == worker.0.id())
                );
            }
        }
    });
}

#[test]
fn what_waits_is_answered_before_the_end() {
    world(&[Need::Python], |world| {
        for words in programs(world) {
            let mut worker = Worker::start(world, &words);
            assert_eq!(worker.terminate(world.address), (WAITING, Some(0)), "{words:?}");
        }
        let mut naive = Worker::start(world, &test_worker("--mode plain"));
        let (answered, _) = naive.terminate(world.address);
        assert!(answered < WAITING, "the control must lose: {answered}");
    });
}

#[test]
fn a_client_can_have_a_socket_of_its_own() {
    world(&[], |world| {
        let mut worker = Worker::start(world, &test_worker("--mode plain --connect 300"));
        let client = client(world.address);
        let [server, peer] = [world.address, client.local_addr().unwrap()].map(|address| {
            let SocketAddr::V4(address) = address else { panic!("{address}") };
            format!("{:08X}:{:04X}", u32::from_le_bytes(address.ip().octets()), address.port())
        });
        let connected = format!(" {server} {peer} 01 ");
        let wait_until = |is_there: bool| {
            let deadline = Instant::now() + PATIENCE;
            while fs::read_to_string("/proc/thread-self/net/udp").unwrap().contains(&connected) != is_there {
                assert!(Instant::now() < deadline, "not {is_there}: {connected}");
                thread::yield_now();
            }
        };
        client.send(b"a").unwrap();
        wait_until(true);
        for _ in 0..2 {
            assert!(client.recv(&mut [0; 64]).unwrap() > 1);
            client.send(b"b").unwrap();
        }
        // Until it was silent for so long.
        wait_until(false);
        client.send(b"crash").unwrap();
        assert_eq!(wait(&mut worker.0, PATIENCE).expect("it ends").code(), Some(3));
    });
}
