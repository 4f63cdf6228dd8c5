//! UDP sockets in a reuseport group: who is in it, what is lost, and the classic program that names slots.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use reuseportd_sys::cbpf::{Pick, Share, attach_slots};
use reuseportd_sys::diag::{Family, Protocol, Query, Socket as Listed, dump, listen_order, states};
use reuseportd_sys::socket;
use socket2::{Domain, Socket, Type};

use crate::world::*;

/// A socket with SO_REUSEPORT; `[::]` serves IPv4 too. From here on it is in the group.
pub(crate) fn bound_datagram(address: SocketAddr) -> UdpSocket {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.into()
}

/// A group on a port of the kernel's choice; `bind()` in the order of the list.
pub(crate) fn datagram_group(address: &str, number: usize) -> (SocketAddr, Vec<UdpSocket>) {
    let first = bound_datagram(address.parse().unwrap());
    let address = first.local_addr().unwrap();
    let more = (1..number).map(|_| bound_datagram(address));
    (address, std::iter::once(first).chain(more).collect())
}

/// Where a client of that family reaches the group.
pub(crate) fn target(address: SocketAddr, family: Family) -> SocketAddr {
    let loopback: IpAddr = match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        _ => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(if address.ip().is_unspecified() { loopback } else { address.ip() }, address.port())
}

/// Each is a flow of its own.
pub(crate) fn clients(target: SocketAddr, number: usize) -> Vec<UdpSocket> {
    let any = SocketAddr::new(target.ip(), 0);
    (0..number).map(|_| UdpSocket::bind(any).unwrap()).collect()
}

/// Sends one datagram from each client, and says which socket each of them reached.
pub(crate) fn reached(target: SocketAddr, clients: &[UdpSocket], sockets: &[UdpSocket]) -> Vec<usize> {
    let mut by_source = BTreeMap::new();
    let mut sent = 0;
    // No more at a time than the smallest buffer holds.
    for some in clients.chunks(100) {
        for client in some {
            client.send_to(b"?", target).unwrap();
        }
        sent += some.len();
        wait_until("the datagrams to arrive", || {
            for (index, socket) in sockets.iter().enumerate() {
                while let Ok((_, from)) = socket.recv_from(&mut [0; 8]) {
                    let source = SocketAddr::new(from.ip().to_canonical(), from.port());
                    assert_eq!(by_source.insert(source, index), None, "one datagram each");
                }
            }
            by_source.len() >= sent
        });
    }
    clients.iter().map(|client| by_source[&client.local_addr().unwrap()]).collect()
}

pub(crate) fn share_of(places: &[usize], place: usize) -> usize {
    places.iter().filter(|&&reached| reached == place).count()
}

fn steer(socket: &UdpSocket, slots: &[u16]) {
    let share = Share { weight_below: 0, slots: slots.to_vec(), pick: Pick::Hash };
    attach_slots(socket.as_fd(), &[share]).unwrap();
}

/// Which of the sockets is in the slot.
fn at_slot(sockets: &[UdpSocket], slot: u16) -> usize {
    steer(&sockets[0], &[slot]);
    let target = target(sockets[0].local_addr().unwrap(), Family::V4);
    let places = reached(target, &clients(target, 8), sockets);
    assert!(places.iter().all(|&place| place == places[0]), "slot {slot} is spread: {places:?}");
    places[0]
}

fn listed(port: u16) -> Vec<Listed> {
    let states = states::CLOSE | states::ESTABLISHED;
    dump(&Query { protocol: Protocol::Udp, family: Family::Both, port: Some(port), states }).unwrap()
}

fn cookies(sockets: &[UdpSocket]) -> Vec<u64> {
    sockets.iter().map(|one| socket::cookie(one.as_fd()).unwrap()).collect()
}

#[test]
fn a_socket_is_in_the_group_from_bind_on_and_gets_nothing_unless_it_is_named() {
    with(&[], || {
        for address in [V4, V6] {
            let (address, mut sockets) = datagram_group(address, 2);
            steer(&sockets[0], &[0, 1]);
            sockets.push(bound_datagram(address));
            let places = reached(address, &clients(address, 60), &sockets);
            assert_eq!(share_of(&places, 2), 0, "{places:?}");
            assert!(share_of(&places, 0) > 10 && share_of(&places, 1) > 10, "{places:?}");
            steer(&sockets[0], &[2]);
            assert_eq!(reached(address, &clients(address, 20), &sockets), [2; 20]);
        }
    });
}

#[test]
fn closing_loses_what_waits_and_moves_the_last_one_into_the_hole() {
    with(&[], || {
        let (address, mut sockets) = datagram_group(V4, 4);
        assert_eq!([0, 1, 2, 3].map(|slot| at_slot(&sockets, slot)), [0, 1, 2, 3]);
        steer(&sockets[0], &[0]);
        for client in clients(address, 5) {
            client.send_to(b"lost", address).unwrap();
        }
        wait_until("the datagrams to wait", || listed(address.port()).iter().any(|one| one.recv_queue > 0));
        drop(sockets.remove(0));
        // Left are the former 1, 2 and 3.
        assert_eq!(
            [0, 1, 2].map(|slot| at_slot(&sockets, slot) + 1),
            [3, 1, 2],
            "and no datagram came along"
        );
    });
}

#[test]
fn what_waits_is_counted_by_throwing_it_away() {
    with(&[], || {
        let (address, sockets) = datagram_group(V4, 1);
        assert_eq!(socket::discard(sockets[0].as_fd()).unwrap(), 0);
        let client = &clients(address, 1)[0];
        for payload in [&[0; 1200][..], b"", b"small"] {
            client.send_to(payload, address).unwrap();
        }
        let mut counted = 0;
        wait_until("all three to arrive", || {
            counted += socket::discard(sockets[0].as_fd()).unwrap();
            counted == 3
        });
        // An error that waits in front of a datagram hides nothing.
        let (peer, gone) = (&clients(address, 1)[0], clients(address, 1)[0].local_addr().unwrap());
        sockets[0].connect(gone).unwrap();
        sockets[0].send(b"to nobody").unwrap();
        sockets[0].connect(peer.local_addr().unwrap()).unwrap();
        peer.send_to(b"!", address).unwrap();
        wait_until("the datagram to arrive", || listed(address.port()).iter().any(|one| one.recv_queue > 0));
        assert_eq!(socket::discard(sockets[0].as_fd()).unwrap(), 1);
        let stream = listening(V4.parse().unwrap());
        assert!(socket::is_datagram(sockets[0].as_fd()).unwrap());
        assert!(!socket::is_datagram(stream.as_fd()).unwrap());
        assert!(socket::discard(std::fs::File::open("/dev/null").unwrap().as_fd()).is_err());
    });
}

#[test]
fn a_dump_shows_a_group_in_bind_order() {
    with(&[Need::Network], || {
        for start in [V4, V6, "0.0.0.0:0", "[::]:0"] {
            let (address, mut sockets) = datagram_group(start, 7);
            let shown = |port| listed(port).iter().map(|one| one.cookie).collect::<Vec<_>>();
            let raw = shown(address.port());
            let mut wanted = cookies(&sockets);
            assert!(listen_order(listed(address.port())).iter().map(|one| one.cookie).eq(wanted.clone()));
            if address.is_ipv4() {
                wanted.reverse();
            }
            assert_eq!(raw, wanted, "IPv4 comes reversed, IPv6 straight");
            // By age, when slots have moved.
            drop(sockets.remove(2));
            sockets.push(bound_datagram(address));
            let ordered = listen_order(listed(address.port()));
            assert!(ordered.iter().map(|one| one.cookie).eq(cookies(&sockets)));
            assert!(ordered.iter().all(|one| one.state == states::CLOSE && one.local == address));
        }
    });
}

#[test]
fn a_dump_keeps_families_on_one_port_apart() {
    with(&[Need::Network], || {
        let only_v6 = |port| {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
            socket.set_only_v6(true).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into()).unwrap();
            UdpSocket::from(socket)
        };
        let first = only_v6(0);
        let port = first.local_addr().unwrap().port();
        let mut v6 = vec![first];
        let mut v4 = Vec::new();
        for _ in 0..3 {
            v4.push(bound_datagram(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)));
            v6.push(only_v6(port));
        }
        let shown: Vec<u64> = listen_order(listed(port)).iter().map(|one| one.cookie).collect();
        assert_eq!(shown, [cookies(&v4), cookies(&v6)].concat());
    });
}

/// Bound to one address it leaves too from Linux 6.13 on; before that it keeps its slot.
#[test]
fn a_socket_that_connects_keeps_its_peer_and_leaves_the_group() {
    with(&[Need::Network], || {
        for (start, family) in [("0.0.0.0:0", Family::V4), ("[::]:0", Family::V6)] {
            let (address, sockets) = datagram_group(start, 4);
            let target = target(address, family);
            let peer = clients(target, 1);
            sockets[1].connect(peer[0].local_addr().unwrap()).unwrap();
            steer(&sockets[0], &[2]);
            assert_eq!(reached(target, &peer, &sockets), [1], "whatever the program says");
            let slot_of = |slot| {
                steer(&sockets[0], &[slot]);
                reached(target, &clients(target, 8), &sockets)
            };
            assert_eq!([0, 1, 2].map(slot_of), [[0; 8], [3; 8], [2; 8]], "the last one is in its slot");
            let ordered = listen_order(listed(address.port()));
            assert!(
                ordered.iter().map(|one| one.cookie).eq(cookies(&sockets)),
                "and it is listed where it was"
            );
            assert_eq!((ordered[1].state, ordered[1].local), (states::ESTABLISHED, target));
            // It never comes back, and no program chooses between it and the group: it takes all.
            rustix::net::connect_unspec(&sockets[1]).unwrap();
            assert_eq!([0, 1, 2].map(slot_of), [[1; 8]; 3]);
            assert_eq!(listed(address.port())[1].state, states::CLOSE);
        }
    });
}

#[test]
fn a_flow_keeps_its_slot_and_shares_hold_whatever_the_family() {
    with(&[Need::Network], || {
        for (start, family) in
            [(V4, Family::V4), (V6, Family::V6), ("[::]:0", Family::V4), ("[::]:0", Family::V6)]
        {
            let (address, sockets) = datagram_group(start, 5);
            let share =
                |weight_below, slots: &[u16]| Share { weight_below, slots: slots.to_vec(), pick: Pick::Hash };
            let target = target(address, family);
            let clients = clients(target, 400);
            attach_slots(sockets[0].as_fd(), &[share(1 << 30, &[1, 2]), share(0, &[3, 4])]).unwrap();
            let places = reached(target, &clients, &sockets);
            let parts = [0, 1, 2, 3, 4].map(|place| share_of(&places, place));
            assert!(
                parts[0] == 0 && (60..140).contains(&(parts[1] + parts[2])),
                "a quarter went astray: {parts:?}"
            );
            // The slot says nothing about the share.
            assert!(parts[1].min(parts[2]) * 2 > 60 / 2 && parts[3].min(parts[4]) > 100, "{parts:?}");
            for _ in 0..3 {
                attach_slots(sockets[4].as_fd(), &[share(1 << 30, &[1, 2]), share(0, &[3, 4])]).unwrap();
                assert_eq!(reached(target, &clients, &sockets), places);
            }
        }
    });
}
