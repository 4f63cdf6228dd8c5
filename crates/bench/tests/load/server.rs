//! Servers for the tests: each connection in a thread, with a behaviour to choose, counted.

use socket2::{Domain, SockRef, Socket, Type};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const BODY: &str = "hello generation=1 seat=0 pid=42\n";

/// A listening socket on a free loopback port (or a given one), with SO_REUSEPORT.
pub(crate) fn listener(port: u16, backlog: i32) -> TcpListener {
    let socket = bound(port);
    socket.listen(backlog).unwrap();
    socket.into()
}

/// Bound, so that nobody else gets the port, but not listening.
pub(crate) fn bound(port: u16) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
    socket
}

/// Accepts and behaves until told to finish.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    accepted: Arc<AtomicU64>,
    listener: TcpListener,
    acceptor: JoinHandle<()>,
}

impl Server {
    pub(crate) fn start(behave: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::on(listener(0, 1024), behave)
    }

    pub(crate) fn on(listener: TcpListener, behave: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicU64::new(0));
        let (tally, source, behave) =
            (Arc::clone(&accepted), listener.try_clone().unwrap(), Arc::new(behave));
        let acceptor = std::thread::spawn(move || {
            let mut threads = Vec::new();
            while let Ok((stream, _)) = source.accept() {
                tally.fetch_add(1, Ordering::SeqCst);
                let behave = Arc::clone(&behave);
                threads.push(std::thread::spawn(move || behave(stream)));
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        Self { address, accepted, listener, acceptor }
    }

    /// Stops accepting, waits for the open connections, and gives the number of accepted ones.
    pub(crate) fn finish(self) -> u64 {
        SockRef::from(&self.listener).shutdown(Shutdown::Both).unwrap();
        self.acceptor.join().unwrap();
        self.accepted.load(Ordering::SeqCst)
    }
}

/// Reads one request head; `None` if the client is gone. Also gives the number of reads that it took.
pub(crate) fn request(stream: &mut TcpStream) -> Option<usize> {
    let (mut head, mut reads) = (Vec::new(), 0);
    while !head.ends_with(b"\r\n\r\n") {
        let mut buffer = [0; 1024];
        let bytes = stream.read(&mut buffer).ok().filter(|bytes| *bytes > 0)?;
        head.extend_from_slice(&buffer[..bytes]);
        reads += 1;
    }
    Some(reads)
}

pub(crate) fn respond(stream: &mut TcpStream, body: &str) {
    // In one write: in pieces, Nagle's algorithm would hold back the second.
    let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(response.as_bytes()).unwrap();
}

/// Half of what [`respond`] would send.
pub(crate) fn respond_half(stream: &mut TcpStream) {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\nhello", BODY.len()).unwrap();
}

/// Closes with RST instead of FIN.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Makes handshakes on `listener` stay half open until the client's first data.
pub(crate) fn defer_accept(listener: &TcpListener) {
    nix::sys::socket::setsockopt(listener, DeferAccept, &10).unwrap();
}

#[derive(Clone)]
struct DeferAccept;

nix::setsockopt_impl!(
    DeferAccept,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    u32,
    nix::sys::socket::sockopt::SetStruct<u32>
);

/// Rows of the kernel's table of IPv4 sockets for the local address of `listener`, split at white space.
fn sockets(listener: &TcpListener) -> Vec<Vec<String>> {
    let local = format!(" 0100007F:{:04X} ", listener.local_addr().unwrap().port());
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let rows = table.lines().filter(|row| row.contains(&local));
    rows.map(|row| row.split_whitespace().map(str::to_owned).collect()).collect()
}

/// Connections waiting in the accept queue of `listener`.
pub(crate) fn depth(listener: &TcpListener) -> u64 {
    let inode =
        std::fs::metadata(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap().ino().to_string();
    let row = sockets(listener).into_iter().find(|row| row[9] == inode).unwrap();
    u64::from_str_radix(row[4].split(':').nth(1).unwrap(), 16).unwrap()
}

/// Handshakes on the port of `listener` that wait for the client's last step.
pub(crate) fn half_open(listener: &TcpListener) -> u64 {
    sockets(listener).iter().filter(|row| row[3] == "03").count() as u64
}

/// Waits until `connections` wait in the accept queues of `listeners` together.
pub(crate) fn wait_queued(listeners: &[&TcpListener], connections: u64) {
    wait_count(connections, || listeners.iter().map(|listener| depth(listener)).sum());
}

/// Waits until there are so many.
pub(crate) fn wait_count(wanted: u64, count: impl Fn() -> u64) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while count() < wanted {
        assert!(Instant::now() < deadline, "{} of {wanted}", count());
        std::thread::yield_now();
    }
}
