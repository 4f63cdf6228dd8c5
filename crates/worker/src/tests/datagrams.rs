//! Workers that receive datagrams.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::fd::AsFd;

use rustix::net::sockopt::{ipv6_v6only, socket_reuseaddr, socket_reuseport};

use super::*;

fn client(server: SocketAddr) -> UdpSocket {
    let any = if server.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(server).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

fn hear(client: &UdpSocket) -> String {
    let mut buffer = [0; 2048];
    let length = client.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

/// Answers with the listener's name and what was asked.
fn serve(serving: Serving) -> Result<(), Error> {
    serving.serve_each(
        |name, mut stream| stream.write_all(name.as_bytes()).unwrap(),
        |name, socket, datagram, peer| {
            socket.send_to(&[name.as_bytes(), b" ", datagram].concat(), peer).unwrap();
        },
    )
}

/// A worker that has been told to serve, and the master's handles of its sockets.
fn serving(listen: &str) -> (Master, Serving, Vec<Socket>) {
    let (master, worker) = Master::with_worker(listen);
    let bound = worker.bind().unwrap();
    let handing_over = thread::spawn(move || worker.ready(bound));
    let handles = master.let_serve();
    (master, handing_over.join().unwrap().unwrap().unwrap(), handles)
}

#[test]
fn what_waits_in_all_its_sockets_is_served_before_drained_is_said_once() {
    let listen = "http=tcp:127.0.0.1:0;dns=udp:127.0.0.1:0;ntp=udp:[::1]:0";
    let (master, serving, handles) = serving(listen);
    let names = |all: &[(String, UdpSocket)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!((serving.listeners.len(), names(&serving.datagrams)), (1, vec!["dns".into(), "ntp".into()]));
    let connection = connect(address(&handles[0]));
    let (dns, ntp) = (client(address(&handles[1])), client(address(&handles[2])));
    // More than a turn of the loop receives, and then some that nobody receives by looping.
    for number in 0..50 {
        dns.send(number.to_string().as_bytes()).unwrap();
    }
    ntp.send(b"now").unwrap();
    ntp.send(b"").unwrap();
    master.say("stop", &[]);
    serve(serving).unwrap();
    assert_eq!(answer(connection), "http");
    for number in 0..50 {
        assert_eq!(hear(&dns), format!("dns {number}"));
    }
    assert_eq!([hear(&ntp), hear(&ntp)], ["ntp now", "ntp "]);
    assert_eq!(master.hear().0, FromWorker::Drained);
    assert_eq!(rustix::io::read(&master.channel, &mut [0; 8]), Ok(0), "once for all, then the end");
    // The master's handles are the last now.
    drop(handles);
    dns.send(b"more").unwrap();
    assert_eq!(dns.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_worker_without_tcp_serves_without_its_master() {
    let (master, serving, handles) = serving("dns=udp:127.0.0.1:0");
    let _worker = thread::spawn(move || serve(serving));
    let client = client(address(&handles[0]));
    client.send(b"a").unwrap();
    assert_eq!(hear(&client), "dns a");
    drop(master);
    for _ in 0..3 {
        client.send(b"b").unwrap();
        assert_eq!(hear(&client), "dns b");
    }
}

#[test]
fn datagrams_are_shared_with_siblings_and_with_nobody_else() {
    let (_master, worker) = Master::with_worker("four=udp:127.0.0.1:0;six=udp:[::]:0");
    let bound = worker.bind().unwrap();
    for one in &bound {
        assert!(socket_reuseport(one).unwrap() && !socket_reuseaddr(one).unwrap());
    }
    assert!(!ipv6_v6only(&bound[1]).unwrap());
    let taken = Socket::from(bound[0].as_fd().try_clone_to_owned().unwrap()).local_addr().unwrap();
    let stranger = Socket::new(socket2::Domain::IPV4, Type::DGRAM, None).unwrap();
    stranger.set_reuse_address(true).unwrap();
    assert_eq!(stranger.bind(&taken).unwrap_err().kind(), ErrorKind::AddrInUse);
    let sibling = Socket::new(socket2::Domain::IPV4, Type::DGRAM, None).unwrap();
    sibling.set_reuse_port(true).unwrap();
    sibling.bind(&taken).unwrap();
}

#[test]
fn datagrams_that_nobody_would_read_are_told() {
    let (_master, serving, _handles) = serving("http=tcp:127.0.0.1:0;dns=udp:127.0.0.1:0");
    let refused = serving.accept_each(|_, _| {}).unwrap_err().to_string();
    assert!(refused.contains("listener dns is UDP") && refused.contains("serve_each"), "{refused}");
}

#[test]
fn a_loop_of_its_own_drains_and_knows_from_whom() {
    let worker = Worker::from_variables(&|_| None, "dns=udp:127.0.0.1:0").unwrap();
    let bound = worker.bind().unwrap();
    let serving = worker.ready(bound).unwrap().unwrap();
    assert!(serving.listeners.is_empty());
    let (name, socket) = &serving.datagrams[0];
    let client = client(socket.local_addr().unwrap());
    let (long, longest) = (vec![b'x'; 1000], vec![b'y'; 65_507]);
    client.send(&long).unwrap();
    client.send(&longest).unwrap();
    let mut got = Vec::new();
    let count = drain_datagrams(socket, |datagram, peer| got.push((datagram.to_vec(), peer))).unwrap();
    let from = client.local_addr().unwrap();
    assert_eq!((name.as_str(), count), ("dns", 2));
    assert!(got == [(long, from), (longest, from)], "whole, in order, and from whom");
    assert_eq!(drain_datagrams(socket, |_, _| ()).unwrap(), 0);
}

#[test]
fn what_became_of_an_answer_is_no_reason_to_stop_receiving() {
    let worker = Worker::from_variables(&|_| None, "dns=udp:127.0.0.1:0").unwrap();
    let bound = worker.bind().unwrap();
    let serving = worker.ready(bound).unwrap().unwrap();
    let socket = &serving.datagrams[0].1;
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // Connected for a moment, so that the kernel tells it that nobody is there.
    socket.connect(gone).unwrap();
    socket.send(b"anybody?").unwrap();
    let told = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&Timespec::try_from(LIMIT).unwrap()));
    assert_eq!(told, Ok(1));
    assert_eq!(drain_datagrams(socket, |_, _| ()).unwrap(), 0);
}
