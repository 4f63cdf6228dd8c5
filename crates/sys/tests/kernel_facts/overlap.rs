//! Addresses that overlap, and what the kernel's list of sockets shows.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};

use reuseportd_sys::diag::{Family, Protocol, Query, dump, listen_order, states};
use reuseportd_sys::socket;

use crate::world::*;

fn listeners_on(port: u16) -> Query {
    Query { protocol: Protocol::Tcp, family: Family::Both, port: Some(port), states: states::LISTEN }
}

fn cookie_of(listener: &TcpListener) -> u64 {
    socket::cookie(fd(listener)).unwrap()
}

#[test]
fn a_dump_shows_a_group_in_listen_order() {
    with(&[], || {
        for start in [V4, V6] {
            for shift in 0..4 {
                let first = bound(start.parse().unwrap());
                let address = first.local_addr().unwrap();
                let listeners: Vec<_> =
                    std::iter::once(first).chain((1..7).map(|_| bound(address))).collect();
                let order: Vec<usize> = (0..7).map(|n| (n * 3 + shift) % 7).collect();
                for &index in &order {
                    socket::listen(fd(&listeners[index]), 16).unwrap();
                }
                let sockets = dump(&listeners_on(address.port())).unwrap();
                let raw: Vec<u64> = sockets.iter().map(|one| one.cookie).collect();
                let mut wanted: Vec<u64> = order.iter().map(|&index| cookie_of(&listeners[index])).collect();
                let shown: Vec<u64> = listen_order(sockets).iter().map(|one| one.cookie).collect();
                assert_eq!(shown, wanted);
                if start == V4 {
                    wanted.reverse();
                }
                assert_eq!(raw, wanted, "IPv4 comes reversed, IPv6 straight");
            }
        }
    });
}

/// The slots are others by then: see `a4_closing_moves_the_last_listener_into_the_hole`.
#[test]
fn a_dump_goes_by_age_when_slots_have_moved() {
    with(&[], || {
        for start in [V4, V6] {
            let (address, mut listeners) = group(start, 4);
            drop(listeners.remove(0));
            listeners.push(bound(address));
            socket::listen(fd(&listeners[3]), 16).unwrap();
            let shown = listen_order(dump(&listeners_on(address.port())).unwrap());
            let shown: Vec<u64> = shown.iter().map(|one| one.cookie).collect();
            assert_eq!(shown, listeners.iter().map(cookie_of).collect::<Vec<u64>>());
        }
    });
}

#[test]
fn a_dump_tells_all_about_a_listener() {
    with(&[], || {
        let (address, listeners) = group(V4, 1);
        socket::listen(fd(&listeners[0]), 33).unwrap();
        let mut clients = connect_many(address, 3);
        spread(&listeners, 3);
        let shown = dump(&listeners_on(address.port())).unwrap();
        assert_eq!(shown.len(), 1);
        assert_eq!((shown[0].local, shown[0].recv_queue, shown[0].send_queue), (address, 3, 33));
        assert_eq!(u64::from(shown[0].inode), socket::inode(fd(&listeners[0])).unwrap());
        assert_eq!((shown[0].state, shown[0].drops, shown[0].v6only), (states::LISTEN, Some(0), None));
        assert_eq!(shown[0].remote, "0.0.0.0:0".parse::<SocketAddr>().unwrap());
        clients[0].write_all(b"four").unwrap();
        let query = Query { states: states::ESTABLISHED, ..listeners_on(address.port()) };
        wait_until("the bytes to arrive", || dump(&query).unwrap().iter().any(|one| one.recv_queue == 4));
        let connections = dump(&query).unwrap();
        let remote = clients[1].local_addr().unwrap();
        assert_eq!((connections.len(), connections.iter().any(|one| one.remote == remote)), (3, true));
    });
}

#[test]
fn a_dump_of_ipv6_tells_dual_stack_from_v6only() {
    with(&[], || {
        let dual = listening("[::]:0".parse().unwrap());
        let address = dual.local_addr().unwrap();
        let shown = dump(&listeners_on(address.port())).unwrap();
        assert_eq!(shown.iter().map(|one| one.v6only).collect::<Vec<_>>(), [Some(false)]);
        let only = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
        only.set_only_v6(true).unwrap();
        only.bind(&"[::]:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        only.listen(1).unwrap();
        let port = only.local_addr().unwrap().as_socket().unwrap().port();
        assert_eq!(dump(&listeners_on(port)).unwrap()[0].v6only, Some(true));
    });
}

#[test]
fn hundreds_of_listeners_are_listed_whole_and_in_order() {
    with(&[Need::Network], || {
        reuseportd_sys::limits::raise_nofile().unwrap();
        for start in [V4, V6] {
            let (address, listeners) = group(start, 1000);
            let wanted: Vec<u64> = listeners.iter().map(cookie_of).collect();
            let shown = listen_order(dump(&listeners_on(address.port())).unwrap());
            assert!(shown.iter().map(|one| one.cookie).eq(wanted), "{start}");
        }
    });
}

#[test]
fn the_more_specific_address_takes_the_traffic_at_once() {
    with(&[Need::Network], || {
        for (wide, narrow) in
            [("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]"), ("[::]", "0.0.0.0"), ("[::]", "127.0.0.1")]
        {
            let (wide, mut listeners) = group(&format!("{wide}:0"), 1);
            let narrow: SocketAddr = format!("{narrow}:{}", wide.port()).parse().unwrap();
            let target = SocketAddr::new(
                if narrow.is_ipv4() { [127, 0, 0, 1].into() } else { narrow.ip() },
                wide.port(),
            );
            assert_eq!(try_spread(target, &listeners, 10), [10]);
            listeners.push(listening(narrow));
            assert_eq!(try_spread(target, &listeners, 10), [0, 10], "{wide} and {narrow}");
        }
    });
}
