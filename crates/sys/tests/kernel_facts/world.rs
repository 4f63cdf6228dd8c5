//! Listeners, clients and a network of one's own.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use reuseportd_sys::bpf::{EbpfGroup, Plan, Range};
use reuseportd_sys::{capability, socket};
use socket2::{Domain, Socket, Type};

/// Long enough for a busy machine; only failures wait for it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// What a fact needs beyond an ordinary user's rights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A network namespace (and root in it).
    Network,
    /// BPF maps and programs.
    Bpf,
}

/// Runs a test on a thread of its own, with descriptors of its own, and in a network namespace of its own where one
/// can be had.
pub(crate) fn with(needs: &[Need], test: fn()) {
    let has_network = capability::has_net_admin();
    for (need, is_met, reason) in [
        (Need::Network, has_network, "a network namespace needs CAP_NET_ADMIN and CAP_SYS_ADMIN"),
        (Need::Bpf, capability::has_bpf(), "the ebpf engine needs CAP_BPF"),
    ] {
        if needs.contains(&need) && !is_met {
            return skip(reason);
        }
    }
    let run = move || {
        enter_own_descriptors();
        if has_network {
            enter_own_network();
        }
        test();
    };
    std::thread::spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Says so past the test harness, which would swallow it.
pub(crate) fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {reason}");
    assert!(
        std::env::var("REUSEPORTD_TEST_REQUIRE").as_deref() != Ok("all"),
        "{name} was skipped but REUSEPORTD_TEST_REQUIRE=all: {reason}"
    );
}

/// Other tests fork; for a moment their children would hold what this test closes.
fn enter_own_descriptors() {
    // SAFETY: this thread has just begun and has opened nothing; the others keep their table.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn enter_own_network() {
    // SAFETY: moves this thread, which the test owns, into a new network namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    let control = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    // SAFETY: all-zero is a valid ifreq; the call reads the name and the flags set here.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).unwrap();
        let fd = control.as_raw_fd();
        assert_eq!(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request), 0);
    }
}

pub(crate) const V4: &str = "127.0.0.1:0";
pub(crate) const V6: &str = "[::1]:0";

/// A socket with SO_REUSEPORT, bound but not listening.
pub(crate) fn bound(address: SocketAddr) -> TcpListener {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.into()
}

pub(crate) fn listening(address: SocketAddr) -> TcpListener {
    let listener = bound(address);
    socket::listen(listener.as_fd(), 4096).unwrap();
    listener
}

/// A group on a port of the kernel's choice; `listen()` in the order of the list.
pub(crate) fn group(address: &str, number: usize) -> (SocketAddr, Vec<TcpListener>) {
    let first = listening(address.parse().unwrap());
    let address = first.local_addr().unwrap();
    let more = (1..number).map(|_| listening(address));
    (address, std::iter::once(first).chain(more).collect())
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
}

pub(crate) fn connect_many(address: SocketAddr, number: usize) -> Vec<TcpStream> {
    (0..number).map(|_| connect(address)).collect()
}

pub(crate) fn queued(listener: &TcpListener) -> usize {
    socket::depth(listener.as_fd()).unwrap().queued as usize
}

/// The accept queues of the listeners once `total` connections are in them.
pub(crate) fn spread(listeners: &[TcpListener], total: usize) -> Vec<usize> {
    let depths = || listeners.iter().map(queued).collect::<Vec<_>>();
    wait_until("the connections to arrive", || depths().iter().sum::<usize>() >= total);
    depths()
}

/// Connects `number` times, says how they were spread, and empties the queues again.
pub(crate) fn try_spread(address: SocketAddr, listeners: &[TcpListener], number: usize) -> Vec<usize> {
    let clients = connect_many(address, number);
    let depths = spread(listeners, number);
    for listener in listeners {
        while listener.accept().is_ok() {}
    }
    drop(clients);
    depths
}

/// Accepts what is queued and answers each connection with one byte; how many there were.
pub(crate) fn serve(listener: &TcpListener) -> usize {
    let mut served = 0;
    while let Ok((mut connection, _)) = listener.accept() {
        connection.write_all(b"!").unwrap();
        served += 1;
    }
    served
}

/// Fates of clients that wait for an answer: answered, reset.
pub(crate) fn fates(clients: Vec<TcpStream>) -> (usize, usize) {
    let mut fates = (0, 0);
    for mut client in clients {
        match client.read(&mut [0]) {
            Ok(1) => fates.0 += 1,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => fates.1 += 1,
            other => panic!("neither answered nor reset: {other:?}"),
        }
    }
    fates
}

pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// A half-open handshake until the client speaks: the kernel answers the SYN but waits for data.
pub(crate) fn defer_accept(listener: &TcpListener) {
    let seconds = 30_i32;
    // SAFETY: the option value is an int that lives across the call.
    let result = unsafe {
        let at = std::ptr::from_ref(&seconds).cast();
        libc::setsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, at, 4)
    };
    assert_eq!(result, 0);
}

/// A range that gets what no range before it got.
pub(crate) fn range(base: u32, count: u32, counter: u32) -> Range {
    Range { weight_below: 0, base, count, counter, step: 0 }
}

/// A steered group: listener i under key i, plan 0 = the keys of `keys`, counter slot 0.
pub(crate) fn steered(listeners: &[TcpListener], keys: std::ops::Range<u32>) -> EbpfGroup {
    let group = EbpfGroup::new(8192, None).unwrap_or_else(|error| panic!("{error}"));
    group.write_plan(0, &Plan { ranges: vec![range(keys.start, keys.end - keys.start, 0)] }).unwrap();
    group.select(0).unwrap();
    for (key, listener) in (0..).zip(listeners) {
        group.admit(key, listener.as_fd()).unwrap();
    }
    group.attach(listeners[0].as_fd()).unwrap();
    group
}

/// Puts a plan with these ranges in force.
pub(crate) fn switch(group: &EbpfGroup, ranges: Vec<Range>) {
    let next = (group.selected().unwrap() + 1) % reuseportd_sys::bpf::PLAN_RECORDS;
    group.write_plan(next, &Plan { ranges }).unwrap();
    group.select(next).unwrap();
}

pub(crate) fn fd(listener: &TcpListener) -> BorrowedFd<'_> {
    listener.as_fd()
}
