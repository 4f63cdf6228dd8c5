//! policy = "cpu": the seat of the processor that a connection or a datagram came in on.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use reuseportd_sys::bpf::{EbpfGroup, Flows, Range};
use reuseportd_sys::cbpf::{Pick, Share, attach_slots};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::datagrams::*;
use crate::world::*;

/// Runs on each processor in turn; on loopback the kernel receives on the one that sends.
fn on_each_cpu(mut run: impl FnMut(usize)) {
    let all = sched_getaffinity(None).unwrap();
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)) {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).unwrap();
        run(cpu);
    }
    sched_setaffinity(None, &all).unwrap();
}

const SEATS: usize = 3;
/// Keys to a seat, of which its worker has the second one.
const STEP: u32 = 4;

fn by_cpu() -> Vec<Range> {
    vec![Range { step: STEP, ..range(0, STEP * 3, 0) }]
}

fn admit<T: AsFd>(group: &EbpfGroup, listeners: &[T]) {
    for (seat, listener) in (0..).zip(listeners) {
        group.admit(seat * STEP + 1, listener.as_fd()).unwrap();
    }
    switch(group, by_cpu());
    group.attach(listeners[0].as_fd()).unwrap();
}

/// Seats in the order of slots 2, 0, 1; the fourth has the worker of the first.
fn attach(listener: BorrowedFd<'_>) {
    let share = |weight_below, slots: &[u16], pick| Share { weight_below, slots: slots.to_vec(), pick };
    attach_slots(listener, &[share(0, &[2, 0, 1, 2], Pick::Cpu)]).unwrap();
}

fn slot_of(cpu: usize) -> usize {
    [2, 0, 1, 2][cpu % 4]
}

#[test]
fn ebpf_connections_reach_the_seat_of_their_processor() {
    with(&[Need::Bpf], || {
        for address in [V4, V6] {
            let (address, listeners) = group(address, SEATS);
            let group = EbpfGroup::new(8192, None).unwrap();
            admit(&group, &listeners);
            on_each_cpu(|cpu| {
                let mut wanted = [0; SEATS];
                wanted[cpu % SEATS] = 20;
                assert_eq!(try_spread(address, &listeners, 20), wanted, "processor {cpu}");
            });
            // A seat without a worker: the next one's.
            group.remove(1).unwrap();
            on_each_cpu(|cpu| {
                let mut wanted = [0; SEATS];
                wanted[[1, 1, 2][cpu % SEATS]] = 20;
                assert_eq!(try_spread(address, &listeners, 20), wanted, "processor {cpu}");
            });
        }
    });
}

#[test]
fn ebpf_datagrams_reach_the_seat_of_their_processor_and_flows_stay_there() {
    with(&[Need::Bpf], || {
        let (address, sockets) = datagram_group(V4, SEATS);
        let flows = Flows::new(1000, 8192).unwrap();
        let group = EbpfGroup::new(8192, Some(&flows)).unwrap();
        admit(&group, &sockets);
        on_each_cpu(|cpu| {
            assert_eq!(reached(address, &clients(address, 20), &sockets), [cpu % SEATS; 20]);
        });
        flows.set_timeout(Some(Duration::from_secs(600))).unwrap();
        let known = clients(address, 20);
        let first = reached(address, &known, &sockets);
        on_each_cpu(|cpu| {
            assert_eq!(reached(address, &known, &sockets), first, "processor {cpu}");
        });
    });
}

#[test]
fn cbpf_connections_and_datagrams_reach_the_seat_of_their_processor() {
    with(&[], || {
        let (address, listeners) = group(V4, SEATS);
        attach(listeners[0].as_fd());
        let (datagrams, sockets): (SocketAddr, _) = datagram_group(V6, SEATS);
        attach(sockets[0].as_fd());
        on_each_cpu(|cpu| {
            let mut wanted = [0; SEATS];
            wanted[slot_of(cpu)] = 20;
            assert_eq!(try_spread(address, &listeners, 20), wanted, "processor {cpu}");
            let places = reached(datagrams, &clients(datagrams, 20), &sockets);
            assert_eq!(places, [slot_of(cpu); 20], "processor {cpu}");
        });
    });
}

/// Of a UDP group the share goes by flow all the same.
#[test]
fn cbpf_a_flow_keeps_its_share_on_all_processors() {
    with(&[], || {
        let (address, sockets) = datagram_group(V4, 4);
        let share =
            |weight_below, slots: &[u16]| Share { weight_below, slots: slots.to_vec(), pick: Pick::Cpu };
        attach_slots(sockets[0].as_fd(), &[share(1 << 31, &[0, 1]), share(0, &[2, 3])]).unwrap();
        let known = clients(address, 60);
        let sides = || reached(address, &known, &sockets).iter().map(|place| place / 2).collect::<Vec<_>>();
        let first = sides();
        assert!((15..45).contains(&share_of(&first, 0)), "{first:?}");
        on_each_cpu(|_| assert_eq!(sides(), first));
    });
}
