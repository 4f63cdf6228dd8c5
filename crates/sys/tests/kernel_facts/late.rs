//! A listener without SO_REUSEPORT becomes a group of one, and leaves it again, while it serves.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use reuseportd_sys::bpf::{EbpfGroup, Plan};
use reuseportd_sys::diag::{self, Family, Protocol, Query, states};
use reuseportd_sys::{late, socket};
use socket2::{Domain, Socket, Type};

use crate::world::*;

const KEY: u32 = 7;

/// As most programs make it.
fn ordinary(address: &str, is_reusable: bool) -> (SocketAddr, TcpListener) {
    let address: SocketAddr = address.parse().unwrap();
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_reuse_address(is_reusable).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(4096).unwrap();
    let listener: TcpListener = socket.into();
    (listener.local_addr().unwrap(), listener)
}

fn steer_to(key: u32) -> EbpfGroup {
    let steer = EbpfGroup::new(8192, None).unwrap_or_else(|error| panic!("{error}"));
    steer.write_plan(0, &Plan { ranges: vec![range(key, 1, 0)] }).unwrap();
    steer.select(0).unwrap();
    steer
}

/// The listener and the helper are a group for as long as this takes.
fn join(listener: &TcpListener, steer: &EbpfGroup) {
    late::set_reuseport(fd(listener), true).unwrap();
    let helper = late::bind_beside(fd(listener)).unwrap();
    socket::listen(helper.as_fd(), 4096).unwrap();
    steer.attach(fd(listener)).unwrap();
    steer.admit(KEY, fd(listener)).unwrap();
    late::packets_under_way_done().unwrap();
}

/// Handshakes that had begun by now, with the helper perhaps, have ended.
fn settle(address: SocketAddr) {
    let half_open = || {
        let query = Query {
            protocol: Protocol::Tcp,
            family: Family::Both,
            port: Some(address.port()),
            states: states::SYN_RECV,
        };
        let sockets = std::iter::repeat_with(|| diag::dump(&query)).find_map(Result::ok).unwrap_or_default();
        sockets.into_iter().map(|socket| socket.cookie).collect::<BTreeSet<_>>()
    };
    let begun = half_open();
    wait_until("begun handshakes", || half_open().is_disjoint(&begun));
}

fn leave(listener: &TcpListener, steer: &EbpfGroup) {
    EbpfGroup::detach(fd(listener)).unwrap();
    steer.remove(KEY).unwrap();
    late::set_reuseport(fd(listener), false).unwrap();
}

/// Connections made without a pause while `act` is repeated; how many were made, and how many of them got no answer.
fn under_load(address: SocketAddr, listener: &TcpListener, times: usize, act: impl Fn()) -> (usize, usize) {
    let (made, lost) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (is_over, is_answered) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_answered.load(Ordering::Relaxed) {
                if let Ok((mut connection, _)) = listener.accept() {
                    let _ = connection.write_all(b"!");
                }
            }
        });
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        let mut answer = [0];
                        let answered =
                            TcpStream::connect_timeout(&address, DEADLINE).and_then(|mut client| {
                                client.set_read_timeout(Some(DEADLINE))?;
                                let read = client.read(&mut answer);
                                // A reset instead of TIME_WAIT: ports are not to run out.
                                socket2::SockRef::from(&client)
                                    .set_linger(Some(std::time::Duration::ZERO))?;
                                read
                            });
                        made.fetch_add(1, Ordering::Relaxed);
                        if !matches!(answered, Ok(1)) {
                            lost.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        for _ in 0..times {
            let before = made.load(Ordering::Relaxed);
            act();
            wait_until("connections", || made.load(Ordering::Relaxed) > before + 4);
        }
        is_over.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
        is_answered.store(true, Ordering::Relaxed);
        // For this one it waits.
        drop(TcpStream::connect(address));
    });
    (made.into_inner(), lost.into_inner())
}

#[test]
fn it_becomes_a_group_and_is_alone_again_without_a_loss() {
    with(&[Need::Network, Need::Bpf], || {
        for address in [V4, V6, "[::]:0"] {
            let (address, listener) = ordinary(address, true);
            let to = SocketAddr::new(
                if address.is_ipv4() { [127, 0, 0, 1].into() } else { "::1".parse().unwrap() },
                address.port(),
            );
            let steer = steer_to(KEY);
            let (made, lost) = under_load(to, &listener, 60, || {
                join(&listener, &steer);
                settle(address);
                leave(&listener, &steer);
            });
            assert_eq!(lost, 0, "of {made}");
            assert!(!socket::is_reuseport(fd(&listener)).unwrap());
            assert!(EbpfGroup::detach(fd(&listener)).is_err(), "a program is left");
        }
    });
}

#[test]
fn without_the_program_what_the_helper_got_is_lost() {
    with(&[Need::Network], || {
        let (address, listener) = ordinary(V4, true);
        late::set_reuseport(fd(&listener), true).unwrap();
        let helper = TcpListener::from(late::bind_beside(fd(&listener)).unwrap());
        socket::listen(helper.as_fd(), 4096).unwrap();
        let clients = connect_many(address, 100);
        let got = queued(&helper);
        drop(helper);
        listener.set_nonblocking(true).unwrap();
        serve(&listener);
        let (answered, reset) = fates(clients);
        assert!(got > 10 && (answered, reset) == (100 - got, got), "{got}: {answered} {reset}");
    });
}

#[test]
fn what_the_helper_got_is_moved_to_the_listener() {
    with(&[Need::Network, Need::Bpf], || {
        let (address, listener) = ordinary(V4, true);
        let steer = steer_to(KEY);
        late::set_reuseport(fd(&listener), true).unwrap();
        let helper = late::bind_beside(fd(&listener)).unwrap();
        assert!(steer.attach(fd(&listener)).is_err(), "a group before anybody was added");
        socket::listen(helper.as_fd(), 4096).unwrap();
        let clients = connect_many(address, 100);
        let helper = TcpListener::from(helper);
        let got = queued(&helper);
        assert!(got > 10 && got < 90, "{got}");
        steer.attach(fd(&listener)).unwrap();
        steer.admit(KEY, fd(&listener)).unwrap();
        drop(helper);
        assert_eq!(steer.counters(0).unwrap().migrated, got as u64);
        assert_eq!(queued(&listener), 100);
        drop(clients);
    });
}

/// Connections from before are no members, and have not SO_REUSEPORT: they are in the way of what binds.
#[test]
fn connections_from_before_are_in_nobodys_way() {
    with(&[Need::Network], || {
        for is_reusable in [true, false] {
            let (address, listener) = ordinary(V4, is_reusable);
            let client = connect(address);
            let accepted = listener.accept().unwrap();
            let bind = || {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_reuse_port(true).unwrap();
                socket.bind(&address.into())
            };
            late::set_reuseport(fd(&listener), true).unwrap();
            assert!(bind().is_err(), "the accepted connection alone keeps it away");
            let helper = late::bind_beside(fd(&listener)).unwrap();
            bind().unwrap();
            drop(helper);
            bind().unwrap();
            late::set_reuseport(fd(&listener), false).unwrap();
            late::bind_beside_no_more(fd(&listener)).unwrap();
            assert!(bind().is_err(), "as it was before");
            drop((client, accepted));
        }
    });
}
