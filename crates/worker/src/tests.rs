//! A worker against a fake master at the other end of its channel.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use reuseportd_wire::channel::FromWorker;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_acceptconn};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use socket2::Type;

use super::*;
use crate::channel::seqpacket_pair;

mod datagrams;

/// Nothing here takes long; a test that waits longer has failed.
const LIMIT: Duration = Duration::from_secs(5);

struct Master {
    channel: OwnedFd,
}

impl Master {
    fn with_worker(listen: &str) -> (Self, Worker) {
        let (near, far) = seqpacket_pair().unwrap();
        set_socket_timeout(&near, Timeout::Recv, Some(LIMIT)).unwrap();
        let channel = far.into_raw_fd().to_string();
        let worker = Worker::from_variables(&environment(&channel, listen), "").unwrap();
        (Self { channel: near }, worker)
    }

    fn say(&self, datagram: &str, fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [IoSlice::new(datagram.as_bytes())];
        sendmsg(&self.channel, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    fn hear(&self) -> (FromWorker, Vec<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0; 5000];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let mut receive = || recvmsg(&self.channel, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        // Told once, by the end of a worker that left an order unread, before what it had sent.
        let got = receive().or_else(|_| receive()).unwrap();
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        (FromWorker::decode(&buffer[..got.bytes]).unwrap(), fds)
    }

    /// Takes the worker's sockets, listens on them and lets it serve.
    fn let_serve(&self) -> Vec<Socket> {
        let (ready, fds) = self.hear();
        assert!(matches!(ready, FromWorker::Ready(names) if names.len() == fds.len()));
        let handles: Vec<Socket> = fds.into_iter().map(Socket::from).collect();
        for handle in &handles {
            assert!(!socket_acceptconn(handle).unwrap(), "the worker must not listen itself");
            if handle.r#type().unwrap() != Type::DGRAM {
                handle.listen(64).unwrap();
            }
        }
        self.say("serve", &[]);
        handles
    }
}

/// What a master gives the worker on seat 1 of 2 of generation 3.
fn environment(channel: &str, listen: &str) -> impl Fn(&str) -> Option<OsString> {
    let given = [
        ("REUSEPORTD_CHANNEL", channel),
        ("REUSEPORTD_GENERATION", "3"),
        ("REUSEPORTD_SEAT", "1"),
        ("REUSEPORTD_WORKERS", "2"),
        ("REUSEPORTD_LISTEN", listen),
    ];
    let given = given.map(|(name, value)| (name, OsString::from(value)));
    move |wanted| given.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.clone())
}

fn address(handle: &Socket) -> SocketAddr {
    handle.local_addr().unwrap().as_socket().unwrap()
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn answer(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn spawn(worker: Worker) -> JoinHandle<Result<u32, Error>> {
    thread::spawn(move || {
        let bound = worker.bind()?;
        let Some(serving) = worker.ready(bound)? else { return Ok(0) };
        let mut count = 0;
        serving.accept_each(|name, mut stream| {
            count += 1;
            let _ = stream.write_all(name.as_bytes());
        })?;
        Ok(count)
    })
}

#[test]
fn a_worker_serves_when_told_and_drains_its_queues_when_told_to_stop() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0;admin=tcp:[::1]:0");
    let (bound, listen) = (worker.bind().unwrap(), worker.listen().len());
    assert_eq!((bound.len(), listen), (2, 2));
    let handing_over = thread::spawn(move || worker.ready(bound));
    let handles = master.let_serve();
    let serving = handing_over.join().unwrap().unwrap().unwrap();
    // Both queues fill and `stop` waits in the channel before the worker accepts the first.
    let mut clients: Vec<TcpStream> = (0..5).map(|_| connect(address(&handles[0]))).collect();
    clients.extend((0..2).map(|_| connect(address(&handles[1]))));
    master.say("stop", &[]);
    serving.accept_each(|name, mut stream| stream.write_all(name.as_bytes()).unwrap()).unwrap();
    let answers: Vec<String> = clients.into_iter().map(answer).collect();
    assert_eq!(answers, ["http", "http", "http", "http", "http", "admin", "admin"]);
    assert_eq!(master.hear().0, FromWorker::Drained);
    let (http, admin) = (address(&handles[0]), address(&handles[1]));
    drop(handles);
    for closed in [http, admin] {
        assert_eq!(TcpStream::connect(closed).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_worker_takes_the_leftovers_of_a_dead_sibling() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    let worker = spawn(worker);
    master.let_serve();
    let sibling = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let dead = sibling.local_addr().unwrap();
    let clients: Vec<TcpStream> = (0..3).map(|_| connect(dead)).collect();
    master.say("take http", &[sibling.as_fd()]);
    let taken = FromWorker::Taken { name: "http".to_owned(), count: 3 };
    assert_eq!(master.hear().0, taken);
    assert!(clients.into_iter().map(answer).all(|text| text == "http"));
    drop(sibling);
    assert!(TcpStream::connect(dead).is_err(), "the worker must have closed its descriptor");
    master.say("take http", &[]);
    assert!(matches!(master.hear().0, FromWorker::Error(text) if text.contains("no descriptor")));
    master.say("stop", &[]);
    assert_eq!(master.hear().0, FromWorker::Drained);
    assert_eq!(worker.join().unwrap().unwrap(), 3);
}

#[test]
fn orders_that_come_again_do_no_harm() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    let bound = worker.bind().unwrap();
    let handing_over = thread::spawn(move || worker.ready(bound));
    let handles = master.let_serve();
    let serving = handing_over.join().unwrap().unwrap().unwrap();
    let sibling = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let left = connect(sibling.local_addr().unwrap());
    for _ in 0..2 {
        master.say("serve", &[]);
        master.say("take http", &[sibling.as_fd()]);
    }
    let clients: Vec<TcpStream> = (0..5).map(|_| connect(address(&handles[0]))).collect();
    master.say("stop", &[]);
    master.say("stop", &[]);
    serving.accept_each(|name, mut stream| stream.write_all(name.as_bytes()).unwrap()).unwrap();
    for count in [1, 0] {
        assert_eq!(master.hear().0, FromWorker::Taken { name: "http".to_owned(), count });
    }
    assert_eq!(master.hear().0, FromWorker::Drained);
    assert!(clients.into_iter().chain([left]).map(answer).all(|text| text == "http"));
}

#[test]
fn a_worker_whose_master_is_gone_goes_on_serving() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    let _worker = spawn(worker);
    let handles = master.let_serve();
    master.say("take http", &[]);
    drop(master); // with an unread answer: the worker sees ECONNRESET before the end
    for _ in 0..3 {
        assert_eq!(answer(connect(address(&handles[0]))), "http");
    }
}

#[test]
fn unknown_and_malformed_orders_are_answered_at_any_time() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    let worker = spawn(worker);
    master.say("dance slowly", &[]);
    let _handles = master.let_serve();
    assert_eq!(master.hear().0, FromWorker::Unknown("dance".to_owned()));
    master.say("take", &[]);
    assert_eq!(master.hear().0, FromWorker::Unknown("take".to_owned()));
    master.say("\u{7f}", &[]);
    master.say(&"a".repeat(4500), &[]);
    master.say("unknown ready", &[]);
    master.say("stop", &[]);
    assert_eq!(master.hear().0, FromWorker::Drained);
    worker.join().unwrap().unwrap();
}

#[test]
fn a_listener_that_was_shut_down_is_told_of() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    let worker = spawn(worker);
    let handles = master.let_serve();
    handles[0].shutdown(std::net::Shutdown::Read).unwrap();
    assert_eq!(master.hear().0, FromWorker::Drained, "nobody else would know");
    master.say("stop", &[]);
    assert_eq!(master.hear().0, FromWorker::Drained);
    worker.join().unwrap().unwrap();
}

#[test]
fn a_worker_stopped_before_it_served_has_nothing_to_do() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    assert_eq!((worker.generation(), worker.seat(), worker.workers()), (3, 1, 2));
    master.say("stop", &[]);
    assert!(worker.ready(Vec::new()).is_err(), "ready needs a socket");
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    master.say("stop", &[]);
    let bound = worker.bind().unwrap();
    assert!(worker.ready(bound).unwrap().is_none());
    let (master_gone, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    drop(master_gone);
    let bound = worker.bind().unwrap();
    assert!(matches!(worker.ready(bound), Err(Error::MasterGone)));
    drop(master);
}

#[test]
fn orders_can_be_waited_for_and_looked_for() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0");
    let bound = worker.bind().unwrap();
    master.say("serve", &[]);
    let mut orders = worker.ready(bound).unwrap().unwrap().orders;
    assert!(orders.try_next_order().is_none());
    master.say("stop", &[]);
    assert!(matches!(orders.next_order(), Order::Stop));
    orders.error("disk full").unwrap();
    master.hear();
    assert_eq!(master.hear().0, FromWorker::Error("disk full".to_owned()));
    drop(master);
    assert!(matches!(orders.try_next_order(), Some(Order::MasterGone)));
    // Only SIGTERM can come now: what is left of the channel must not wake anybody.
    assert!(orders.try_next_order().is_none());
    assert_eq!(poll(&mut [PollFd::new(&orders, PollFlags::IN)], Some(&Timespec::default())), Ok(0));
    orders.drained().unwrap();
}

/// The environment of a worker that must say so twice a second, and where it says it.
fn watched(name: &str, pid: u32) -> (UnixDatagram, impl Fn(&str) -> Option<OsString>) {
    let name = format!("reuseportd-worker-{}-{name}", std::process::id());
    let heard = UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(&name).unwrap()).unwrap();
    heard.set_nonblocking(true).unwrap();
    let given = [
        ("WATCHDOG_USEC", "1000000".to_owned()),
        ("WATCHDOG_PID", pid.to_string()),
        ("NOTIFY_SOCKET", format!("@{name}")),
    ];
    let find =
        move |wanted: &str| given.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.into());
    (heard, find)
}

#[test]
fn signs_of_life_are_given_when_they_are_due() {
    let (heard, variables) = watched("due", std::process::id());
    let half = Duration::from_millis(500);
    let hear = || {
        let mut buffer = [0; 64];
        heard.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec())
    };
    let mut watchdog = Watchdog::from_variables(&variables).unwrap().unwrap();
    assert_eq!(watchdog.feed().unwrap(), half);
    assert_eq!(hear().unwrap(), b"WATCHDOG=1");
    assert!((Duration::from_nanos(1)..half).contains(&watchdog.feed().unwrap()));
    assert_eq!(hear(), None, "not due yet");
    // A master that has too much to read is told again soon, and one that is gone is none to wait for.
    while watchdog.alive().unwrap() {}
    watchdog.due = Instant::now();
    assert_eq!(watchdog.feed().unwrap(), half / 8);
    drop(heard);
    watchdog.due = Instant::now();
    assert_eq!(watchdog.feed().unwrap(), half);
}

#[test]
fn signs_of_life_are_not_given_for_others() {
    let watchdog = |variables: &Variables<'_>| Watchdog::from_variables(variables).unwrap();
    let (_heard, mine) = watched("others", std::process::id());
    assert!(watchdog(&|name| mine(name).filter(|_| name != "WATCHDOG_PID")).is_some());
    for without in ["WATCHDOG_USEC", "NOTIFY_SOCKET"] {
        assert!(watchdog(&|name| mine(name).filter(|_| name != without)).is_none(), "{without}");
    }
    assert!(
        watchdog(&|name| mine(name).map(|value| if name == "WATCHDOG_USEC" { "0".into() } else { value }))
            .is_none()
    );
    let (_heard, parents) = watched("parents", std::os::unix::process::parent_id());
    assert!(watchdog(&parents).is_none());
    let wrong = |name: &str| (name == "WATCHDOG_USEC").then(|| "1s".into());
    let told = Watchdog::from_variables(&wrong).unwrap_err().to_string();
    assert!(told.contains("WATCHDOG_USEC has the value '1s'"), "{told}");
}

#[test]
fn without_a_master_a_worker_listens_at_once() {
    let worker = Worker::from_variables(&|_| None, "http=tcp:127.0.0.1:0").unwrap();
    assert_eq!((worker.generation(), worker.seat(), worker.workers()), (0, 0, 1));
    let mut defer = 0;
    let bound = worker.bind_with(|listen, socket| {
        defer += usize::from(listen.name == "http");
        socket.set_keepalive(true)
    });
    let mut serving = worker.ready(bound.unwrap()).unwrap().unwrap();
    assert_eq!(defer, 1);
    assert!(serving.orders.try_next_order().is_none());
    let (_, listener) = &serving.listeners[0];
    let client = connect(listener.local_addr().unwrap());
    assert_eq!(drain(listener, |mut stream| stream.write_all(b"hi").unwrap()).unwrap(), 1);
    assert_eq!(answer(client), "hi");
}

#[test]
fn an_address_that_is_taken_is_told_with_its_remedy() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (_master, worker) = Master::with_worker(&format!("http=tcp:{}", taken.local_addr().unwrap()));
    let text = worker.bind().unwrap_err().to_string();
    assert!(text.starts_with("bind listener http on 127.0.0.1:") && text.contains("SO_REUSEPORT"), "{text}");
    let taken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (_master, worker) = Master::with_worker(&format!("dns=udp:{}", taken.local_addr().unwrap()));
    let text = worker.bind().unwrap_err().to_string();
    assert!(text.starts_with("bind listener dns on 127.0.0.1:") && text.contains("SO_REUSEPORT"), "{text}");
}

#[test]
fn the_inherited_number_is_taken_over_only_if_it_is_a_channel() {
    let (near, far) = seqpacket_pair().unwrap();
    let number = far.into_raw_fd();
    let channel = Channel::inherited(number).unwrap();
    channel.send_error("here").unwrap();
    set_socket_timeout(&near, Timeout::Recv, Some(LIMIT)).unwrap();
    let master = Master { channel: near };
    assert_eq!(master.hear().0, FromWorker::Error("here".to_owned()));
    drop(channel);
    assert_eq!(rustix::io::read(&master.channel, &mut [0; 8]), Ok(0), "the number must be closed");
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let refused = Channel::inherited(other.as_raw_fd()).unwrap_err().to_string();
    assert!(refused.contains("REUSEPORTD_CHANNEL"), "{refused}");
    assert!(other.local_addr().is_ok(), "what is no channel stays open");
    assert!(Channel::inherited(1 << 20).is_err());
}

#[test]
fn an_environment_that_is_not_whole_is_told() {
    let (_near, far) = seqpacket_pair().unwrap();
    let channel = far.as_raw_fd().to_string();
    let whole = environment(&channel, "http=tcp:127.0.0.1:0");
    let without_seat = |name: &str| (name != "REUSEPORTD_SEAT").then(|| whole(name)).flatten();
    let told = |variables: &Variables<'_>| Worker::from_variables(variables, "").unwrap_err().to_string();
    assert!(told(&without_seat).starts_with("environment variable REUSEPORTD_SEAT is missing"));
    assert!(told(&environment("x", "")).contains("REUSEPORTD_CHANNEL has the value 'x'"));
    assert!(told(&environment(&channel, "http=8080")).contains("'http=8080'"));
    assert!(Worker::from_variables(&|_| None, "8080").is_err());
    let by_hand = |name: &str| (name == "REUSEPORTD_LISTEN").then(|| "admin=tcp:[::1]:9".into());
    assert_eq!(Worker::from_variables(&by_hand, "http=tcp:127.0.0.1:0").unwrap().listen()[0].name, "admin");
}

#[test]
fn a_listener_that_was_shut_down_is_given_up() {
    let (master, worker) = Master::with_worker("http=tcp:127.0.0.1:0;admin=tcp:127.0.0.1:0");
    let worker = spawn(worker);
    let handles = master.let_serve();
    handles[0].shutdown(Shutdown::Read).unwrap();
    assert_eq!(answer(connect(address(&handles[1]))), "admin");
    handles[1].shutdown(Shutdown::Read).unwrap();
    drop(master);
    // Nothing can come any more, neither a connection nor an order.
    let (ended, end) = mpsc::channel();
    thread::spawn(move || ended.send(worker.join()));
    assert_eq!(end.recv_timeout(LIMIT).unwrap().unwrap().unwrap(), 1);
}
