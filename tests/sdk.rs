//! Workers on the SDK whose master is not there to speak to them: SIGTERM is the order they can still be given.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::time::Instant;

use reuseportd_sys::socket::{recv_with_fds, send_with_fds, seqpacket_pair};
use reuseportd_wire::status::MasterState;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;
use socket2::Socket;

use crate::crash::queues_of_twenty;
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::Load;
use crate::support::master::Master;
use crate::support::process::{signal, wait};
use crate::support::world::{Need, World, example, needs_of, world};

/// 20 ms of work for each connection it accepts, so that some wait when the signal comes.
const SLOW: &str = "--accept-delay 20";
const CLIENTS: usize = 20;

/// A worker that ends with the test.
struct Worker(Child);

impl Worker {
    fn start(world: &World, options: &str, variables: &[(&str, String)]) -> Worker {
        let mut words = test_worker(options).into_iter();
        let mut command = Command::new(words.next().unwrap());
        let listen = format!("default=tcp:{}", world.address);
        command.args(words).args(["--listen", &listen]);
        Worker(command.envs(variables.iter().cloned()).spawn().unwrap())
    }

    /// One that has a master, at the other end of this channel.
    fn with_channel(world: &World) -> (Worker, OwnedFd) {
        let (near, far) = seqpacket_pair().unwrap();
        fcntl_setfd(&far, FdFlags::empty()).unwrap();
        let variables = [
            ("REUSEPORTD_CHANNEL", far.as_raw_fd().to_string()),
            ("REUSEPORTD_GENERATION", "1".to_owned()),
            ("REUSEPORTD_SEAT", "0".to_owned()),
            ("REUSEPORTD_WORKERS", "1".to_owned()),
            ("REUSEPORTD_LISTEN", format!("default=tcp:{}", world.address)),
        ];
        (Worker::start(world, &format!("--mode sdk {SLOW}"), &variables), near)
    }

    /// Ends it by SIGTERM with clients in its queue; how many are answered, and its exit code.
    fn terminate(&mut self, address: SocketAddr) -> (usize, Option<i32>) {
        let clients = [(); CLIENTS].map(|()| ask(address));
        signal(self.0.id(), Signal::TERM);
        let answered = clients.into_iter().filter_map(answer).count();
        (answered, wait(&mut self.0, PATIENCE).expect("it ends").code())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn ask(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address);
    stream.write_all(b"who?\n").unwrap();
    stream
}

/// `None` when the connection was cut.
fn answer(mut stream: TcpStream) -> Option<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text).ok().filter(|length| *length > 0)?;
    Some(text)
}

/// Waits until somebody listens.
fn wait_listening(address: SocketAddr) {
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "nobody listens on {address}");
        std::thread::yield_now();
    }
}

#[test]
fn sigterm_is_an_order_to_stop() {
    world(&[], |world| {
        let ended = |mode: &str| {
            let mut worker = Worker::start(world, &format!("--mode {mode} {SLOW}"), &[]);
            wait_listening(world.address);
            worker.terminate(world.address)
        };
        assert_eq!(ended("sdk"), (CLIENTS, Some(0)));
        let (answered, code) = ended("naive");
        assert!(answered < CLIENTS && code.is_none(), "the control must lose: {answered}");
    });
}

#[test]
fn sigterm_reaches_a_loop_of_the_programs_own() {
    world(&[], |world| {
        let mut command = Command::new(example("http_tokio"));
        command.env("REUSEPORTD_LISTEN", format!("http=tcp:{}", world.address));
        let mut worker = Worker(command.spawn().unwrap());
        wait_listening(world.address);
        let mut asked = connect(world.address);
        asked.write_all(b"GET /slow?ms=300 HTTP/1.0\r\n\r\n").unwrap();
        signal(worker.0.id(), Signal::TERM);
        assert!(answer(asked).is_some_and(|text| text.starts_with("HTTP/1.1 200 OK")));
        assert_eq!(wait(&mut worker.0, PATIENCE).expect("it ends").code(), Some(0));
    });
}

#[test]
fn a_worker_without_a_master_serves_on_and_stops_by_sigterm() {
    world(&[], |world| {
        let (mut worker, near) = Worker::with_channel(world);
        let handles = serve(&near);
        wait_listening(world.address);
        // The master ends, and with it all it held.
        drop((near, handles));
        assert!(answer(ask(world.address)).is_some_and(|text| text.contains("generation=1")));
        assert_eq!(worker.terminate(world.address), (CLIENTS, Some(0)));
    });
}

#[test]
fn a_worker_that_does_not_serve_yet_ends_by_sigterm() {
    world(&[], |world| {
        let (mut worker, near) = Worker::with_channel(world);
        hear_ready(&near);
        signal(worker.0.id(), Signal::TERM);
        assert_eq!(wait(&mut worker.0, PATIENCE).expect("it ends").code(), Some(0));
    });
}

/// What a master does with a worker that is ready: listens on its sockets and tells it.
fn serve(channel: &OwnedFd) -> Vec<Socket> {
    let handles: Vec<Socket> = hear_ready(channel).into_iter().map(Socket::from).collect();
    for handle in &handles {
        handle.listen(128).unwrap();
    }
    send_with_fds(channel.as_fd(), b"serve", &[]).unwrap();
    handles
}

fn hear_ready(channel: &OwnedFd) -> Vec<OwnedFd> {
    let patience = PATIENCE.try_into().unwrap();
    assert_eq!(poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&patience)), Ok(1), "it says nothing");
    let mut buffer = [0; 4096];
    let received = recv_with_fds(channel.as_fd(), &mut buffer).unwrap();
    assert_eq!(&buffer[..received.bytes], b"ready default");
    received.fds
}

fn stopped_by_hand(engine: &'static str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, "--mode sdk --accept-delay 5").engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(queues_of_twenty(world));
        for stops in 1..=3 {
            signal(master.serving()[0], Signal::TERM);
            master.wait_status("replaced", |status| {
                let restarts: u32 = status.generations[0].workers.iter().map(|worker| worker.restarts).sum();
                restarts == stops && status.state == MasterState::Steady && master.serving().len() == 4
            });
            load.answered(100);
        }
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn a_worker_stopped_by_hand_loses_nothing_ebpf() {
    stopped_by_hand("ebpf");
}

#[test]
fn a_worker_stopped_by_hand_loses_nothing_cbpf() {
    stopped_by_hand("cbpf");
}

/// It has closed its listeners, and is there as long as its connections are: who is still sent to it waits in vain.
#[test]
fn a_worker_stopped_by_hand_gets_no_connections_while_it_finishes_others() {
    world(&[Need::Bpf], |world| {
        for engine in ["ebpf", "cbpf"] {
            let app = App::test_worker(world, "--mode sdk").workers(2).engine(engine);
            let master = Master::start(world, &app);
            // Each worker gets some of so many.
            let held = [(); 16].map(|()| connect(world.address));
            held.iter().for_each(|mut stream| stream.write_all(b"half").unwrap());
            master.wait_status("accepted", |status| status.generations[0].connections == Some(16));
            let pid = master.serving()[0];
            signal(pid, Signal::TERM);
            master.wait_status("noticed", |_| master.serving().len() == 1);
            for _ in 0..16 {
                assert!(
                    answer(ask(world.address)).is_some_and(|text| !text.contains(&format!("pid={pid}\n")))
                );
            }
            let finished = held.map(|mut stream| {
                stream.write_all(b" a line\n").unwrap();
                answer(stream).expect("none is cut")
            });
            assert!(finished.iter().any(|text| text.contains(&format!("pid={pid}\n"))), "{finished:?}");
            master.wait_status("replaced", |_| master.serving().len() == 2);
            master.stop();
        }
    });
}
