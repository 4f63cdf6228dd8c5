//! The `ebpf` engine and UDP on the real kernel: flows, and who they belong to.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use reuseportd_sys::bpf::{BpfError, Counters, EbpfGroup, FlowCounters, Flows, Range};
use reuseportd_sys::diag::Family;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use rustix::time::{ClockId, clock_gettime};

use crate::datagrams::*;
use crate::world::*;

/// Longer than any test.
const LONG: Option<Duration> = Some(Duration::from_secs(600));

/// Socket i under key i, which belongs to generation i + 1; all flows go to key 0.
fn steered_datagrams(sockets: &[UdpSocket], table: u32) -> (EbpfGroup, Flows) {
    let flows = Flows::new(table, 8192).unwrap_or_else(|error| panic!("{error}"));
    let group = EbpfGroup::new(8192, Some(&flows)).unwrap_or_else(|error| panic!("{error}"));
    switch(&group, vec![range(0, 1, 0)]);
    for (key, socket) in (0..).zip(sockets) {
        flows.set_owner(key, key + 1).unwrap();
        group.admit(key, socket.as_fd()).unwrap();
    }
    group.attach(sockets[0].as_fd()).unwrap();
    (group, flows)
}

/// A group of three, its clients' target, and ten clients whose flows have begun at key 0.
fn begun() -> (SocketAddr, Vec<UdpSocket>, Vec<UdpSocket>, EbpfGroup, Flows) {
    let (address, sockets) = datagram_group(V4, 3);
    let (group, flows) = steered_datagrams(&sockets, 1000);
    flows.set_timeout(LONG).unwrap();
    let known = clients(address, 10);
    assert_eq!(reached(address, &known, &sockets), [0; 10]);
    (address, sockets, known, group, flows)
}

fn now() -> Duration {
    clock_gettime(ClockId::Monotonic).try_into().unwrap()
}

#[test]
fn the_verifier_accepts_both_programs_with_cap_bpf_alone() {
    with(&[Need::Network, Need::Bpf], || {
        let only = CapabilitySets {
            effective: CapabilitySet::BPF,
            permitted: CapabilitySet::BPF,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, only).unwrap();
        let flows = Flows::new(65536, 8192).unwrap_or_else(|error| panic!("{error}"));
        for flows in [None, Some(&flows)] {
            EbpfGroup::new(8192, flows).unwrap_or_else(|error| panic!("{error}"));
        }
    });
}

#[test]
fn a_socket_gets_nothing_until_it_is_admitted() {
    with(&[Need::Bpf], || {
        for address in [V4, V6] {
            let (address, mut sockets) = datagram_group(address, 2);
            let (group, _flows) = steered_datagrams(&sockets, 100);
            sockets.push(bound_datagram(address));
            switch(&group, vec![range(0, 8, 3)]);
            let places = reached(address, &clients(address, 60), &sockets);
            assert_eq!(share_of(&places, 2), 0, "{places:?}");
            group.admit(7, sockets[2].as_fd()).unwrap();
            switch(&group, vec![range(7, 1, 4)]);
            assert_eq!(reached(address, &clients(address, 20), &sockets), [2; 20]);
            assert_eq!(group.counters(3).unwrap(), Counters { new: 60, migrated: 0 });
            assert_eq!(group.flow_counters().unwrap(), FlowCounters::default(), "none is kept");
        }
    });
}

#[test]
fn flows_stay_where_they_began_and_new_ones_go_where_the_plan_says() {
    with(&[Need::Network, Need::Bpf], || {
        for (start, family) in
            [(V4, Family::V4), (V6, Family::V6), ("[::]:0", Family::V4), ("[::]:0", Family::V6)]
        {
            let (address, sockets) = datagram_group(start, 2);
            let (group, flows) = steered_datagrams(&sockets, 1000);
            flows.set_timeout(LONG).unwrap();
            let target = target(address, family);
            let known = clients(target, 50);
            assert_eq!(flows.last(0).unwrap(), None);
            let before = now();
            assert_eq!(reached(target, &known, &sockets), [0; 50]);
            let last = flows.last(0).unwrap().unwrap();
            assert!((before..now()).contains(&last));
            switch(&group, vec![range(1, 1, 1)]);
            for _ in 0..3 {
                assert_eq!(reached(target, &known, &sockets), [0; 50]);
            }
            assert!(flows.last(0).unwrap().unwrap() > last);
            assert_eq!(flows.last(1).unwrap(), None);
            assert_eq!(reached(target, &clients(target, 50), &sockets), [1; 50]);
            let counted = [0, 1].map(|slot| group.counters(slot).unwrap().new);
            assert_eq!(counted, [50, 50], "what goes on is nobody's new flow");
            assert_eq!(group.flow_counters().unwrap(), FlowCounters { begun: 100, overflow: 0 });
        }
    });
}

#[test]
fn one_client_has_a_flow_to_each_local_address() {
    with(&[Need::Network, Need::Bpf], || {
        let (address, sockets) = datagram_group("0.0.0.0:0", 2);
        let (group, flows) = steered_datagrams(&sockets, 1000);
        flows.set_timeout(LONG).unwrap();
        let to = |ip: [u8; 4]| SocketAddr::from((ip, address.port()));
        let client = clients(to([127, 0, 0, 1]), 1);
        assert_eq!(reached(to([127, 0, 0, 1]), &client, &sockets), [0]);
        switch(&group, vec![range(1, 1, 1)]);
        assert_eq!(reached(to([127, 0, 0, 2]), &client, &sockets), [1]);
        assert_eq!(reached(to([127, 0, 0, 1]), &client, &sockets), [0]);
    });
}

#[test]
fn a_flow_that_was_idle_begins_anew() {
    with(&[Need::Bpf], || {
        let (address, sockets, known, group, flows) = begun();
        switch(&group, vec![range(1, 1, 1)]);
        assert_eq!(reached(address, &known, &sockets), [0; 10]);
        let last = flows.last(0).unwrap().unwrap();
        let timeout = Duration::from_millis(30);
        wait_until("the flows to be idle", || now() > last + timeout);
        flows.set_timeout(Some(timeout)).unwrap();
        assert_eq!(reached(address, &known[..5], &sockets), [1; 5]);
        flows.set_timeout(LONG).unwrap();
        assert_eq!(reached(address, &known, &sockets)[..5], [1; 5], "it is a flow of the other one now");
        assert_eq!(group.flow_counters().unwrap(), FlowCounters { begun: 15, overflow: 0 });
    });
}

#[test]
fn without_a_timeout_each_datagram_is_chosen_for_by_the_plan() {
    with(&[Need::Bpf], || {
        let (address, sockets, known, group, flows) = begun();
        flows.set_timeout(None).unwrap();
        switch(&group, vec![range(1, 1, 1)]);
        assert_eq!(reached(address, &known, &sockets), [1; 10]);
        assert_eq!(group.counters(1).unwrap().new, 10);
        assert_eq!(group.flow_counters().unwrap().begun, 10);
        assert_eq!(flows.last(1).unwrap(), None);
    });
}

#[test]
fn a_flow_begins_anew_when_its_key_is_empty_or_its_socket_closes() {
    with(&[Need::Bpf], || {
        let (address, mut sockets, known, group, _flows) = begun();
        switch(&group, vec![range(1, 2, 1)]);
        group.remove(0).unwrap();
        let places = reached(address, &known, &sockets);
        assert_eq!(share_of(&places, 0), 0, "{places:?}");
        group.admit(0, sockets[0].as_fd()).unwrap();
        assert_eq!(reached(address, &known, &sockets), places, "they are flows of others now");
        drop(sockets.remove(1));
        let places: Vec<_> = places.iter().map(|_| 1).collect();
        assert_eq!(reached(address, &known, &sockets), places);
    });
}

#[test]
fn a_key_with_another_owner_keeps_no_flow() {
    with(&[Need::Bpf], || {
        let (address, sockets, known, group, flows) = begun();
        switch(&group, vec![range(1, 1, 1)]);
        let last = flows.last(0).unwrap();
        flows.set_owner(0, 1).unwrap();
        assert_eq!(flows.last(0).unwrap(), last, "the owner it has already");
        assert_eq!(reached(address, &known, &sockets), [0; 10]);
        flows.set_owner(0, 9).unwrap();
        assert_eq!(flows.last(0).unwrap(), None);
        assert_eq!(reached(address, &known, &sockets), [1; 10]);
        assert!(matches!(flows.set_owner(8192, 1), Err(BpfError::Entry { .. })));
        assert!(matches!(flows.last(u32::MAX), Err(BpfError::Entry { .. })));
        flows.set_owner(8191, 1).unwrap();
    });
}

#[test]
fn a_plan_without_ranges_refuses_known_flows_too() {
    with(&[Need::Bpf], || {
        let (address, sockets, known, group, _flows) = begun();
        switch(&group, vec![]);
        let refused = |client: &UdpSocket| {
            client.connect(address).unwrap();
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            client.send(b"?").unwrap();
            client.recv(&mut [0]).unwrap_err().kind() == ErrorKind::ConnectionRefused
        };
        assert!(refused(&known[0]) && refused(&clients(address, 1)[0]));
        assert_eq!(group.group_counters().unwrap().refused, 2);
        switch(&group, vec![range(1, 1, 1)]);
        assert_eq!(reached(address, &known, &sockets), [0; 10], "they are remembered all the same");
    });
}

#[test]
fn flows_beyond_the_table_are_counted_within_a_timeout() {
    with(&[Need::Bpf], || {
        let (address, sockets) = datagram_group(V4, 1);
        let (group, flows) = steered_datagrams(&sockets, 200);
        flows.set_timeout(LONG).unwrap();
        let many = clients(address, 500);
        reached(address, &many[..200], &sockets);
        assert_eq!(group.flow_counters().unwrap(), FlowCounters { begun: 200, overflow: 0 });
        reached(address, &many[200..], &sockets);
        assert_eq!(group.flow_counters().unwrap(), FlowCounters { begun: 500, overflow: 300 });
        // A window is over after the timeout: as many again fit into the next one.
        let last = flows.last(0).unwrap().unwrap();
        let timeout = Duration::from_millis(1);
        wait_until("the window to end", || now() > last + timeout);
        flows.set_timeout(Some(timeout)).unwrap();
        reached(address, &clients(address, 1), &sockets);
        assert_eq!(group.flow_counters().unwrap(), FlowCounters { begun: 501, overflow: 300 });
    });
}

#[test]
fn flows_and_switches_outlive_their_descriptors_and_a_table_can_be_replaced() {
    with(&[Need::Bpf], || {
        let (address, sockets, known, group, flows) = begun();
        let copies = group.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        let flow_copies = flows.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        drop((group, flows));
        let (group, flows) = (EbpfGroup::from_fds(copies), Flows::from_fds(flow_copies));
        switch(&group, vec![range(1, 1, 1)]);
        assert_eq!(reached(address, &known, &sockets), [0; 10]);
        flows.set_owner(0, 7).unwrap();
        assert_eq!(reached(address, &known, &sockets), [1; 10]);
        let larger = Flows::new(5000, 8192).unwrap();
        let group = group.with_flows(&larger).unwrap();
        larger.set_timeout(LONG).unwrap();
        switch(&group, vec![range(2, 1, 2)]);
        assert_eq!(reached(address, &known, &sockets), [1; 10], "not attached yet");
        group.attach(sockets[0].as_fd()).unwrap();
        assert_eq!(reached(address, &known, &sockets), [2; 10], "nothing is known of them there");
        switch(&group, vec![range(1, 1, 1)]);
        assert_eq!(reached(address, &known, &sockets), [2; 10]);
        assert_eq!(group.counters(2).unwrap().new, 10);
    });
}

#[test]
fn weights_divide_flows_and_a_flow_never_changes_sides_while_the_plan_stays() {
    with(&[Need::Bpf], || {
        let (address, sockets) = datagram_group(V4, 3);
        let (group, _none) = steered_datagrams(&sockets, 100);
        let tenth = Range { weight_below: u32::MAX / 10, ..range(0, 1, 1) };
        let plan = vec![tenth, range(1, 2, 2)];
        switch(&group, plan.clone());
        let clients = clients(address, 800);
        let places = reached(address, &clients, &sockets);
        let parts = [0, 1, 2].map(|place| share_of(&places, place));
        assert!((45..120).contains(&parts[0]), "a tenth of 800 went astray: {parts:?}");
        assert!(parts[1].min(parts[2]) > 300, "{parts:?}");
        for _ in 0..3 {
            switch(&group, plan.clone());
            assert_eq!(reached(address, &clients, &sockets), places);
        }
    });
}

#[test]
fn nothing_of_the_program_chooses_a_socket_that_has_connected() {
    with(&[Need::Network, Need::Bpf], || {
        let (address, mut sockets) = datagram_group("0.0.0.0:0", 2);
        let (group, flows) = steered_datagrams(&sockets, 100);
        flows.set_timeout(LONG).unwrap();
        let target = target(address, Family::V4);
        let peer = clients(target, 1);
        sockets.push(bound_datagram(address));
        sockets[2].connect(peer[0].local_addr().unwrap()).unwrap();
        assert_eq!(reached(target, &peer, &sockets), [2]);
        assert_eq!(reached(target, &clients(target, 20), &sockets), [0; 20]);
        // One that was admitted is not any more.
        let peer = clients(target, 1);
        sockets[0].connect(peer[0].local_addr().unwrap()).unwrap();
        assert_eq!(group.cookie_at(0).unwrap(), None);
        switch(&group, vec![range(0, 2, 1)]);
        assert_eq!(reached(target, &peer, &sockets), [0]);
        assert_eq!(reached(target, &clients(target, 20), &sockets), [1; 20]);
        switch(&group, vec![]);
        assert_eq!(reached(target, &peer, &sockets), [0], "it keeps its peer");
    });
}

/// Datagrams of old flows and of new ones, sent before a switch and after it.
type Received = [[u32; 2]; 2];

fn take(socket: &UdpSocket, received: &mut Received) {
    let mut payload = [0; 2];
    while socket.recv(&mut payload).is_ok() {
        received[usize::from(payload[0])][usize::from(payload[1])] += 1;
    }
}

/// What is sent after `select` has returned says so.
#[test]
fn a_switch_is_exact_under_traffic() {
    with(&[Need::Network, Need::Bpf], || {
        let (address, sockets) = datagram_group(V4, 2);
        let (group, flows) = steered_datagrams(&sockets, 60_000);
        flows.set_timeout(LONG).unwrap();
        let (is_switched, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        let port = AtomicU16::new(2000);
        let (mut at_old, mut at_new) = (Received::default(), Received::default());
        let network = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    rustix::thread::move_into_link_name_space(network.as_fd(), None).unwrap();
                    let old = &clients(address, 1)[0];
                    old.send_to(&[0, 0], address).unwrap();
                    while !is_over.load(Ordering::SeqCst) {
                        let now = is_switched.load(Ordering::SeqCst);
                        old.send_to(&[0, now.into()], address).unwrap();
                        // A port that was used before would be a known flow's.
                        let source = SocketAddr::new(address.ip(), port.fetch_add(1, Ordering::SeqCst));
                        UdpSocket::bind(source).unwrap().send_to(&[1, now.into()], address).unwrap();
                    }
                });
            }
            let mut run_until = |is_enough: fn(&Received, &Received) -> bool| {
                wait_until("traffic", || {
                    take(&sockets[0], &mut at_old);
                    take(&sockets[1], &mut at_new);
                    is_enough(&at_old, &at_new)
                });
            };
            run_until(|old, _| old[1][0] > 500);
            switch(&group, vec![range(1, 1, 1)]);
            is_switched.store(true, Ordering::SeqCst);
            run_until(|old, new| old[0][1] > 500 && new[1][1] > 500);
            is_over.store(true, Ordering::SeqCst);
        });
        let _ = writeln!(std::io::stderr(), "old listener {at_old:?}, new listener {at_new:?}");
        assert_eq!(at_old[1][1], 0, "a new flow strayed to the old listener");
        assert_eq!(at_new[0], [0, 0], "an old flow left its listener");
    });
}
