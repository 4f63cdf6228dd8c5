//! The `ebpf` engine on the real kernel.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::time::Instant;

use reuseportd_sys::bpf::{BpfError, Counters, EbpfGroup, Plan, Probe, Range};
use reuseportd_sys::{diag, limits, socket};

use crate::world::*;

#[test]
fn the_verifier_accepts_the_program_quickly() {
    with(&[Need::Bpf], || {
        let start = Instant::now();
        let group = EbpfGroup::new(8192, None).unwrap_or_else(|error| panic!("{error}"));
        let spent = start.elapsed();
        let _ = writeln!(std::io::stderr(), "maps and program loaded in {spent:?}");
        assert!(spent.as_millis() < 100, "{spent:?}");
        assert_eq!(group.group_counters().unwrap(), Default::default());
    });
}

#[test]
fn only_the_keys_of_the_plan_are_chosen() {
    with(&[Need::Bpf], || {
        for address in [V4, V6] {
            let (address, listeners) = group(address, 5);
            let steer = steered(&listeners, 0..1);
            assert_eq!(try_spread(address, &listeners, 50), [50, 0, 0, 0, 0]);
            switch(&steer, vec![range(3, 2, 9)]);
            let depths = try_spread(address, &listeners, 200);
            assert_eq!(depths[..3], [0, 0, 0]);
            assert!(depths[3] > 40 && depths[4] > 40, "{depths:?}");
            assert_eq!(steer.counters(0).unwrap(), Counters { new: 50, migrated: 0 });
            assert_eq!(steer.counters(9).unwrap(), Counters { new: 200, migrated: 0 });
            steer.clear_counters(0).unwrap();
            assert_eq!(steer.counters(0).unwrap(), Counters::default());
        }
    });
}

#[test]
fn a_thousand_keys_and_holes_everywhere() {
    with(&[Need::Bpf], || {
        limits::raise_nofile().unwrap();
        let (address, mut listeners) = group(V4, 1024);
        let steer = steered(&listeners, 0..1024);
        let depths = try_spread(address, &listeners, 2000);
        assert_eq!(depths.iter().sum::<usize>(), 2000);
        assert!(depths.iter().filter(|&&depth| depth > 0).count() > 700);
        // Only key 700 is left in the range, and it is found from every start.
        let outside = listening(address);
        for key in (0..1024).filter(|&key| key != 700) {
            steer.remove(key).unwrap();
        }
        steer.remove(3).unwrap();
        let survivor = listeners.swap_remove(700);
        assert_eq!(try_spread(address, &[survivor, outside], 300), [300, 0]);
        assert_eq!(steer.group_counters().unwrap().unsteered, 0);
    });
}

#[test]
fn a_dead_range_falls_through_to_the_next_and_then_to_the_hash() {
    with(&[Need::Bpf], || {
        let (address, mut listeners) = group(V4, 3);
        let steer = steered(&listeners, 0..1);
        let all = Range { weight_below: u32::MAX, ..range(0, 1, 1) };
        switch(&steer, vec![all, range(1, 1, 2)]);
        drop(listeners.remove(0));
        assert_eq!(try_spread(address, &listeners, 30), [30, 0], "range 1 is empty, range 2 takes all");
        assert_eq!(steer.counters(2).unwrap().new, 30);
        drop(listeners.remove(0));
        assert_eq!(try_spread(address, &listeners, 30), [30], "nobody of the plan is left");
        assert_eq!(steer.group_counters().unwrap().unsteered, 30);
    });
}

#[test]
fn weights_divide_new_connections() {
    with(&[Need::Bpf], || {
        let (address, listeners) = group(V4, 3);
        let steer = steered(&listeners, 0..1);
        let canary = Range { weight_below: u32::MAX / 10, ..range(0, 1, 1) };
        switch(&steer, vec![canary, range(1, 2, 2)]);
        let depths = try_spread(address, &listeners, 2000);
        assert!((130..270).contains(&depths[0]), "a tenth of 2000 went astray: {depths:?}");
        assert_eq!(steer.counters(1).unwrap().new, depths[0] as u64);
    });
}

#[test]
fn a_stranger_in_the_group_is_never_chosen_and_nothing_strays_at_a_switch() {
    with(&[Need::Bpf], || {
        let (address, listeners) = group(V4, 2);
        let steer = steered(&listeners, 0..1);
        let stranger = [listening(address)];
        for turn in 0..50 {
            let chosen = turn % 2;
            switch(&steer, vec![range(chosen, 1, 0)]);
            assert_eq!(try_spread(address, &listeners[chosen as usize..=chosen as usize], 10), [10]);
        }
        assert_eq!(spread(&stranger, 0), [0]);
    });
}

#[test]
fn a_full_accept_queue_moves_when_its_listener_closes() {
    with(&[Need::Bpf], || {
        for address in [V4, V6] {
            let (address, mut listeners) = group(address, 3);
            let steer = steered(&listeners, 0..1);
            let clients = connect_many(address, 200);
            assert_eq!(spread(&listeners, 200), [200, 0, 0]);
            switch(&steer, vec![range(2, 1, 5)]);
            drop(listeners.remove(0));
            assert_eq!((serve(&listeners[0]), serve(&listeners[1])), (0, 200), "all go where the plan says");
            assert_eq!(fates(clients), (200, 0));
            assert_eq!(steer.counters(5).unwrap(), Counters { new: 0, migrated: 200 });
        }
    });
}

/// 50 half-open handshakes at key 0, then `end` ends that listener, then the clients speak: their fates.
fn half_open(end: impl FnOnce(TcpListener)) -> (usize, usize) {
    let (address, mut listeners) = group(V4, 2);
    listeners.iter().for_each(defer_accept);
    let steer = steered(&listeners, 0..1);
    let mut clients = connect_many(address, 50);
    let port = Some(address.port());
    let query = diag::Query {
        protocol: diag::Protocol::Tcp,
        family: diag::Family::V4,
        port,
        states: diag::states::SYN_RECV,
    };
    let waiting = diag::dump(&query).unwrap();
    assert_eq!(waiting.len(), 50);
    assert!(waiting.iter().all(|one| one.inode == 0 && one.state == diag::states::SYN_RECV));
    switch(&steer, vec![range(1, 1, 1)]);
    end(listeners.remove(0));
    for client in &mut clients {
        client.write_all(b"?").unwrap();
    }
    let mut served = 0;
    if steer.counters(1).unwrap().migrated > 0 {
        wait_until("the handshakes to finish", || {
            served += serve(&listeners[0]);
            served == 50
        });
        assert_eq!(steer.counters(1).unwrap(), Counters { new: 0, migrated: 50 });
    }
    fates(clients)
}

#[test]
fn half_open_handshakes_move_when_their_listener_closes() {
    with(&[Need::Bpf], || assert_eq!(half_open(drop), (50, 0)));
}

#[test]
fn while_a_duplicate_is_held_closing_moves_nothing_and_shutdown_moves_all() {
    with(&[Need::Bpf], || {
        let (address, mut listeners) = group(V4, 2);
        let steer = steered(&listeners, 0..1);
        let clients = connect_many(address, 50);
        let handle = listeners[0].try_clone().unwrap();
        switch(&steer, vec![range(1, 1, 1)]);
        drop(listeners.remove(0));
        assert_eq!((queued(&handle), queued(&listeners[0])), (50, 0));
        socket::shutdown_read(fd(&handle)).unwrap();
        assert_eq!(spread(&listeners, 50), [50]);
        assert_eq!(serve(&listeners[0]), 50);
        assert_eq!(fates(clients), (50, 0));
        assert_eq!(steer.cookie_at(0).unwrap(), None, "the kernel has emptied the key");

        let mut held = None;
        let moved = half_open(|listener| {
            socket::shutdown_read(fd(&listener)).unwrap();
            held = Some(listener);
        });
        assert_eq!(moved, (50, 0));
    });
}

#[test]
fn an_anchor_keeps_clients_waiting_instead_of_refused() {
    with(&[Need::Bpf], || {
        let (address, mut listeners) = group(V4, 1);
        let steer = steered(&listeners, 0..2);
        let anchor = listeners[0].try_clone().unwrap();
        drop(listeners.remove(0));
        let clients = connect_many(address, 20);
        let respawned = listening(address);
        steer.admit(1, fd(&respawned)).unwrap();
        socket::shutdown_read(fd(&anchor)).unwrap();
        assert_eq!(serve(&respawned), 20);
        assert_eq!(fates(clients), (20, 0));
    });
}

#[test]
fn a_plan_without_ranges_refuses_at_once_but_lets_begun_ones_finish() {
    with(&[Need::Bpf], || {
        let (address, mut listeners) = group(V4, 2);
        listeners.iter().for_each(defer_accept);
        let steer = steered(&listeners, 0..1);
        let mut begun = connect_many(address, 10);
        switch(&steer, vec![]);
        let start = Instant::now();
        let refused = std::net::TcpStream::connect_timeout(&address, DEADLINE).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(start.elapsed().as_millis() < 200, "{:?}", start.elapsed());
        assert_eq!(steer.group_counters().unwrap().refused, 1);
        for client in begun.iter_mut().take(5) {
            client.write_all(b"?").unwrap();
        }
        assert_eq!(spread(&listeners, 5), [5, 0]);
        // The others' listener goes: the kernel moves all ten to the one that is left.
        drop(listeners.remove(0));
        for client in begun.iter_mut().skip(5) {
            client.write_all(b"?").unwrap();
        }
        assert_eq!(spread(&listeners, 10), [10]);
        assert_eq!(serve(&listeners[0]), 10);
        assert_eq!(fates(begun), (10, 0));
    });
}

#[test]
fn a_probe_reaches_one_worker_before_any_client_does() {
    with(&[Need::Bpf], || {
        for (bind, target, source) in [
            ("127.0.0.1:0", "127.0.0.1", "127.0.0.1:0"),
            ("[::1]:0", "[::1]", "[::1]:0"),
            ("[::]:0", "127.0.0.1", "127.0.0.1:0"),
        ] {
            let (bound_to, listeners) = group(bind, 3);
            let steer = steered(&listeners, 0..1);
            let source: std::net::SocketAddr = source.parse().unwrap();
            let client =
                socket2::Socket::new(socket2::Domain::for_address(source), socket2::Type::STREAM, None)
                    .unwrap();
            client.bind(&source.into()).unwrap();
            let remote = client.local_addr().unwrap().as_socket().unwrap();
            steer.set_probe(Some(Probe { remote, key: 1 })).unwrap();
            steer.set_probe(Some(Probe { remote, key: 2 })).unwrap();
            let target: std::net::SocketAddr = format!("{target}:{}", bound_to.port()).parse().unwrap();
            client.connect(&target.into()).unwrap();
            let _others = connect_many(target, 20);
            assert_eq!(spread(&listeners, 21), [20, 0, 1], "{bind}");
            assert_eq!(steer.counters(0).unwrap().new, 20, "the probe is not counted");
            steer.set_probe(None).unwrap();
        }
    });
}

#[test]
fn steering_outlives_its_descriptors_and_can_be_taken_over() {
    with(&[Need::Bpf], || {
        let (address, listeners) = group(V4, 2);
        let steer = steered(&listeners, 0..1);
        let copies = steer.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        drop(steer);
        let steer = EbpfGroup::from_fds(copies);
        switch(&steer, vec![range(1, 1, 0)]);
        assert_eq!(try_spread(address, &listeners, 20), [0, 20]);
        drop(steer);
        let late = listening(address);
        assert_eq!(try_spread(address, &listeners, 20), [0, 20]);
        assert_eq!(queued(&late), 0);
        // Nobody can switch any more: the dead master's array still has the listeners.
        let second = EbpfGroup::new(16, None).unwrap();
        let busy = second.admit(0, fd(&listeners[0])).unwrap_err();
        assert_eq!(busy.errno(), Some(libc::EBUSY), "{busy}");
    });
}

/// As what a keeper of another version might have held.
#[test]
fn maps_that_are_others_than_believed_are_neither_read_nor_written() {
    with(&[Need::Bpf], || {
        let steer = EbpfGroup::new(16, None).unwrap();
        let [sockets, plans, control, counters, probes, program] =
            steer.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        // The kernel would write a whole plan record to where there is room for a number.
        let wrong = EbpfGroup::from_fds([sockets, counters, plans, control, probes, program]);
        for result in [wrong.selected().map(drop), wrong.select(1), wrong.clear_counters(0)] {
            assert_eq!(result.unwrap_err().errno(), Some(libc::EINVAL));
        }
    });
}

#[test]
fn a_group_whose_maps_are_lost_can_be_taken_over() {
    with(&[Need::Bpf], || {
        let (address, listeners) = group(V4, 3);
        drop(steered(&listeners, 0..1));
        let next = EbpfGroup::new(16, None).unwrap();
        next.write_plan(0, &Plan { ranges: vec![range(4, 1, 0)] }).unwrap();
        next.select(0).unwrap();
        let is_busy = |result: Result<(), BpfError>| match result {
            Ok(()) => false,
            Err(error) => error.errno() == Some(libc::EBUSY) || panic!("{error}"),
        };
        assert!(is_busy(next.admit(4, fd(&listeners[0]))), "the attached program keeps the old array");
        // Any member speaks for the group. From now on nobody is chosen by the old plan; the old array goes a while
        // later, and until then the kernel's hash chooses.
        let start = Instant::now();
        next.attach(fd(&listeners[2])).unwrap();
        let clients = connect_many(address, 30);
        for (key, listener) in (4..).zip(&listeners) {
            wait_until("the old array to go", || !is_busy(next.admit(key, fd(listener))));
        }
        let _ = writeln!(std::io::stderr(), "the old array was gone after {:?}", start.elapsed());
        assert_eq!(spread(&listeners, 30).iter().sum::<usize>(), 30);
        assert_eq!(listeners.iter().map(serve).sum::<usize>(), 30);
        assert_eq!(fates(clients), (30, 0));
        assert_eq!(try_spread(address, &listeners, 20), [20, 0, 0]);
    });
}

#[test]
fn a_listener_is_admitted_again_or_moved_to_another_key() {
    with(&[Need::Bpf], || {
        let (_, listeners) = group(V4, 2);
        let steer = steered(&listeners, 0..1);
        let cookie = |at: usize| Some(socket::cookie(fd(&listeners[at])).unwrap());
        let at = |key| steer.cookie_at(key).unwrap();
        let handle = listeners[0].try_clone().unwrap();
        steer.admit(0, fd(&handle)).unwrap();
        assert_eq!([at(0), at(1)], [cookie(0), cookie(1)]);
        steer.admit(5, fd(&listeners[0])).unwrap();
        assert_eq!([at(0), at(1), at(5)], [None, cookie(1), cookie(0)]);
        // Over another one, which can then be put elsewhere.
        steer.admit(1, fd(&listeners[0])).unwrap();
        assert_eq!([at(0), at(1), at(5)], [None, cookie(0), None]);
        steer.admit(8191, fd(&listeners[1])).unwrap();
        steer.admit(0, fd(&listeners[1])).unwrap();
        assert_eq!([at(0), at(1), at(8191)], [cookie(1), cookie(0), None]);
        let elsewhere = EbpfGroup::new(16, None).unwrap();
        assert_eq!(elsewhere.admit(0, fd(&listeners[0])).unwrap_err().errno(), Some(libc::EBUSY));
    });
}

#[test]
fn keys_that_nobody_knows_are_emptied() {
    with(&[Need::Bpf], || {
        let (address, listeners) = group(V4, 3);
        let steer = steered(&listeners, 0..3);
        steer.admit(8191, fd(&listening(address))).unwrap();
        let start = Instant::now();
        steer.retain_keys(&BTreeSet::from([1, 7])).unwrap();
        let _ = writeln!(std::io::stderr(), "8192 keys looked at in {:?}", start.elapsed());
        let is_there = |key| steer.cookie_at(key).unwrap().is_some();
        assert_eq!([0, 1, 2, 8191].map(is_there), [false, true, false, false]);
        assert_eq!(try_spread(address, &listeners, 20), [0, 20, 0]);
    });
}

#[test]
fn what_the_maps_cannot_hold_is_refused_with_a_reason() {
    with(&[Need::Bpf], || {
        let (address, listeners) = group(V4, 1);
        let steer = steered(&listeners, 0..1);
        let plan = |ranges| Plan { ranges };
        assert!(matches!(steer.write_plan(0, &plan(vec![])), Err(BpfError::Invalid(_))), "it is in force");
        assert!(matches!(steer.write_plan(1, &plan(vec![range(0, 1, 0); 5])), Err(BpfError::Invalid(_))));
        assert!(matches!(steer.write_plan(1, &plan(vec![range(0, 1025, 0)])), Err(BpfError::Invalid(_))));
        assert!(matches!(steer.write_plan(1, &plan(vec![range(0, 1, 64)])), Err(BpfError::Invalid(_))));
        assert!(matches!(steer.select(64), Err(BpfError::Invalid(_))));
        assert_eq!(steer.admit(8192, fd(&listeners[0])).unwrap_err().errno(), Some(libc::E2BIG));
        assert_eq!(steer.admit(1, fd(&bound(address))).unwrap_err().errno(), Some(libc::EINVAL));
        assert_eq!(steer.cookie_at(0).unwrap(), Some(socket::cookie(fd(&listeners[0])).unwrap()));
    });
}
