//! Descriptors that are sent to the master: none stays, and none keeps it waiting.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use socket2::SockRef;

use super::{beside_worker, descriptors, let_go};
use crate::support::app::App;
use crate::support::master::Master;
use crate::support::world::{Need, world};

/// The kernel's limit for one message.
const MOST: usize = 253;

/// A socket of this kind, connected to a path.
fn connected(kind: SocketType, path: &Path) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    socket
}

/// Sends them, unless the kernel refuses for the master (Linux 6.16 and later), or there is no more room.
fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    let expected = [Errno::PERM, Errno::AGAIN, Errno::PIPE, Errno::CONNRESET, Errno::TOOMANYREFS];
    assert!(sent.is_ok() || expected.contains(&sent.unwrap_err()), "{sent:?}");
    sent
}

#[test]
fn what_is_sent_to_a_runtime_socket_does_not_stay() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        let null = File::open("/dev/null").unwrap();
        let many = [null.as_fd(); MOST];
        let path = |suffix: &str| world.path(&format!("run/control.sock{suffix}"));
        let before = descriptors(master.pid());
        let notify = connected(SocketType::DGRAM, &path(".notify"));
        for _ in 0..200 {
            let _ = send(&notify, b"STATUS=take this", &many);
        }
        for _ in 0..20 {
            let keeper = connected(SocketType::SEQPACKET, &path(".keeper"));
            let _ = send(&keeper, b"hold a b c", &many);
            let control = connected(SocketType::STREAM, &path(""));
            let _ = send(&control, b"{\"command\":", &many);
        }
        master.upgrade();
        let after = descriptors(master.pid());
        assert!(after <= before + 20, "{before} descriptors, now {after}");
        master.stop();
    });
}

/// A connection that takes its time to close: its peer reads nothing, and there is something to be sent.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut full = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    full.set_nonblocking(true).unwrap();
    while full.write(&[0; 65_536]).is_ok() {}
    SockRef::from(&full).set_linger(Some(Duration::from_secs(20))).unwrap();
    (full, peer)
}

#[test]
fn no_descriptor_keeps_the_master_waiting() {
    world(&[Need::Python], |world| {
        let python = "\
def full():
    listener = socket.create_server(('127.0.0.1', 0))
    client = socket.create_connection(listener.getsockname())
    kept.append(listener.accept()[0])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array('i', [1, 20]))
    client.setblocking(False)
    try:
        while True: client.send(bytes(65536))
    except BlockingIOError: return client
kept = []
channel = socket.socket(fileno=int(os.environ['REUSEPORTD_CHANNEL']))
for text in [b'hello', b'taken x 1', b'ready default', b'ready nobody', b'ready default default']:
    with full() as client: socket.send_fds(channel, [text], [client.fileno()])
";
        let app = beside_worker(world, "--mode sdk", python).workers(1);
        let master = Master::start(world, &app);
        for (kind, suffix) in [(SocketType::DGRAM, ".notify"), (SocketType::STREAM, "")] {
            let socket = connected(kind, &world.path(&format!("run/control.sock{suffix}")));
            let (full, _peer) = lingering();
            let _ = send(&socket, b"STATUS=take this", &[full.as_fd()]);
            drop((full, socket));
        }
        let_go(world);
        let asked = std::time::Instant::now();
        master.status();
        assert!(asked.elapsed() < Duration::from_secs(10), "it waited for {:?}", asked.elapsed());
        master.upgrade();
        master.stop();
    });
}

#[test]
fn what_a_worker_sends_does_not_pile_up() {
    world(&[Need::Python], |world| {
        let python = "\
channel = socket.socket(fileno=int(os.environ['REUSEPORTD_CHANNEL']))
null = os.open('/dev/null', os.O_RDONLY)
host, port = os.environ['REUSEPORTD_LISTEN'].split('tcp:')[1].split(':')
for count in range(300):
    for text, fds in [(b'ready default', [null] * 253), (b'hello', [null] * 100), (b'taken x 1', [null])]:
        socket.send_fds(channel, [text], fds)
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, int(port)))
        socket.send_fds(channel, [b'ready default'], [bound.fileno()])
";
        let master = Master::start(world, &beside_worker(world, "--mode sdk", python).workers(1));
        let before = descriptors(master.pid());
        let_go(world);
        // Those of a message that is being read are there for a moment.
        let status = master.wait_status("as before", |_| descriptors(master.pid()) <= before + 20);
        assert_eq!(status.listeners[0].strangers, Some(0), "{status:#?}");
        master.upgrade();
        master.stop();
    });
}
