//! Slots of a group and the classic program that names them (the `cbpf` engine), and what is lost without one.

use std::net::TcpListener;
use std::process::{Command, Stdio};

use reuseportd_sys::cbpf::{Pick, Share, attach_slots, detach, has_rcu_fix};
use reuseportd_sys::socket;

use crate::world::*;

fn share(weight_below: u32, slots: &[u16]) -> Share {
    Share { weight_below, slots: slots.to_vec(), pick: Pick::Hash }
}

fn steer(listener: &TcpListener, slots: &[u16]) {
    attach_slots(fd(listener), &[share(0, slots)]).unwrap();
}

/// Which listener is in the slot.
fn at_slot(listeners: &[TcpListener], slot: u16) -> usize {
    steer(&listeners[0], &[slot]);
    let depths = try_spread(listeners[0].local_addr().unwrap(), listeners, 8);
    depths.iter().position(|&depth| depth == 8).unwrap_or_else(|| panic!("slot {slot} is spread: {depths:?}"))
}

#[test]
fn a1_a_program_naming_a_slot_sends_everything_there() {
    with(&[], || {
        for address in [V4, V6] {
            let (_, listeners) = group(address, 4);
            for slot in 0..4 {
                assert_eq!(at_slot(&listeners, slot), usize::from(slot));
            }
        }
    });
}

#[test]
fn a2_a25_slots_follow_listen_and_not_bind() {
    with(&[], || {
        let first = bound(V4.parse().unwrap());
        let address = first.local_addr().unwrap();
        let listeners = [first, bound(address), bound(address), bound(address)];
        for index in [2, 0, 1] {
            socket::listen(fd(&listeners[index]), 128).unwrap();
        }
        let order: Vec<usize> = (0..3)
            .map(|slot| {
                steer(&listeners[0], &[slot]);
                let depths = try_spread(address, &listeners[..3], 8);
                depths.iter().position(|&depth| depth == 8).unwrap()
            })
            .collect();
        assert_eq!(order, [2, 0, 1]);
    });
}

#[test]
fn a3_a_slot_that_does_not_exist_spreads_over_all() {
    with(&[], || {
        let (address, listeners) = group(V4, 4);
        steer(&listeners[0], &[9]);
        let depths = try_spread(address, &listeners, 200);
        assert!(depths.iter().all(|&depth| depth > 10), "{depths:?}");
    });
}

#[test]
fn a4_closing_moves_the_last_listener_into_the_hole() {
    with(&[], || {
        let (address, mut listeners) = group(V4, 4);
        drop(listeners.remove(0));
        // Left are the former 1, 2 and 3.
        assert_eq!([0, 1, 2].map(|slot| at_slot(&listeners, slot) + 1), [3, 1, 2]);
        steer(&listeners[0], &[3]);
        assert!(try_spread(address, &listeners, 200).iter().all(|&depth| depth > 10));
    });
}

#[test]
fn a5_any_member_replaces_the_program_and_may_then_go() {
    with(&[], || {
        let (address, mut listeners) = group(V4, 4);
        steer(&listeners[0], &[0]);
        steer(&listeners[3], &[1]);
        drop(listeners.remove(3));
        assert_eq!(try_spread(address, &listeners, 20), [0, 20, 0]);
        detach(fd(&listeners[2])).unwrap();
        assert!(try_spread(address, &listeners, 200).iter().all(|&depth| depth > 10));
        assert_eq!(detach(fd(&listeners[2])).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    });
}

#[test]
fn a6_a_share_may_name_scattered_slots_and_weights_hold() {
    with(&[], || {
        let (address, listeners) = group(V4, 5);
        steer(&listeners[0], &[0, 2, 3]);
        let depths = try_spread(address, &listeners, 300);
        assert_eq!((depths[1], depths[4]), (0, 0), "{depths:?}");
        assert!([0, 2, 3].iter().all(|&slot| depths[slot] > 60), "{depths:?}");
        attach_slots(fd(&listeners[0]), &[share(1 << 30, &[1]), share(0, &[4])]).unwrap();
        let depths = try_spread(address, &listeners, 400);
        assert_eq!(depths[1] + depths[4], 400);
        assert!((60..140).contains(&depths[1]), "a quarter of 400 went astray: {depths:?}");
    });
}

#[test]
fn a7_a_program_of_scattered_slots_is_accepted_whole() {
    with(&[], || {
        let (address, listeners) = group(V4, 1);
        let slots: Vec<u16> = (0..1024).map(|slot| slot * 2).collect();
        steer(&listeners[0], &slots);
        assert_eq!(try_spread(address, &listeners, 50), [50]);
        let too_many: Vec<u16> = (0..4000).map(|slot| slot * 2).collect();
        let error = attach_slots(fd(&listeners[0]), &[share(0, &too_many)]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    });
}

#[test]
fn a7_nobody_may_attach_through_an_inherited_descriptor() {
    with(&[Need::Network], || {
        let (address, listeners) = group(V4, 3);
        // SAFETY: the raw call changes this thread only, which belongs to this test.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        assert!(!reuseportd_sys::capability::has_net_admin());
        steer(&listeners[1], &[2]);
        assert_eq!(try_spread(address, &listeners, 20), [0, 0, 20]);
    });
}

#[test]
fn a9_tcp_info_shows_depth_and_backlog() {
    with(&[], || {
        let (address, listeners) = group(V4, 1);
        socket::listen(fd(&listeners[0]), 77).unwrap();
        let _clients = connect_many(address, 5);
        assert_eq!(spread(&listeners, 5), [5]);
        assert_eq!(socket::depth(fd(&listeners[0])).unwrap().backlog, 77);
    });
}

/// Fates of five queued connections when their listener ends and another of the group is open.
fn lose_a_listener(end: impl FnOnce(TcpListener)) -> (usize, usize) {
    let (address, mut listeners) = group(V4, 2);
    steer(&listeners[0], &[0]);
    let clients = connect_many(address, 5);
    assert_eq!(spread(&listeners, 5), [5, 0]);
    end(listeners.remove(0));
    serve(&listeners[0]);
    fates(clients)
}

#[test]
fn a10_closing_resets_the_queue() {
    with(&[], || {
        if reuseportd_sys::procfs::sysctl("net.ipv4.tcp_migrate_req").as_deref() == Some("1") {
            return skip("tcp_migrate_req is on here");
        }
        assert_eq!(lose_a_listener(drop), (0, 5));
    });
}

#[test]
fn a11_with_tcp_migrate_req_the_queue_moves_and_is_counted() {
    with(&[Need::Network], || {
        std::fs::write("/proc/sys/net/ipv4/tcp_migrate_req", "1").unwrap();
        let moved = reuseportd_sys::procfs::netstat("TCPMigrateReqSuccess").unwrap();
        assert_eq!(lose_a_listener(drop), (5, 0));
        assert_eq!(reuseportd_sys::procfs::netstat("TCPMigrateReqSuccess"), Some(moved + 5));
        assert_eq!(reuseportd_sys::procfs::netstat("TCPMigrateReqFailure"), Some(0));
    });
}

#[test]
fn a12_shutdown_resets_the_queue_too() {
    with(&[], || {
        let mut held = None;
        let reset = lose_a_listener(|listener| {
            socket::shutdown_read(fd(&listener)).unwrap();
            assert!(!socket::is_listening(fd(&listener)).unwrap());
            held = Some(listener);
        });
        assert_eq!(reset, (0, 5));
    });
}

#[test]
fn a13_a_duplicate_keeps_slot_and_queue_of_a_killed_worker() {
    with(&[], || {
        let (address, listeners) = group(V4, 2);
        steer(&listeners[0], &[1]);
        let worker_end = listeners[1].try_clone().unwrap();
        let mut worker = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(worker_end)))
            .spawn()
            .unwrap();
        let clients = connect_many(address, 3);
        assert_eq!(spread(&listeners, 3), [0, 3]);
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert_eq!(try_spread(address, &listeners[1..], 0), [3], "the queue is intact");
        drop(clients);
        let clients = connect_many(address, 3);
        assert_eq!(spread(&listeners, 3), [0, 3], "the slot is intact");
        steer(&listeners[0], &[0]);
        assert_eq!(try_spread(address, &listeners[..1], 4), [4], "steering away works");
        assert_eq!(serve(&listeners[1]), 3);
        assert_eq!(fates(clients), (3, 0));
    });
}

#[test]
fn a26_a27_neither_a_bound_socket_nor_listening_again_changes_slots() {
    with(&[], || {
        let (address, listeners) = group(V4, 3);
        let never_listened = bound(address);
        assert_eq!([0, 1, 2].map(|slot| at_slot(&listeners, slot)), [0, 1, 2]);
        drop(never_listened);
        assert_eq!([0, 1, 2].map(|slot| at_slot(&listeners, slot)), [0, 1, 2]);
        socket::listen(fd(&listeners[0]), 64).unwrap();
        assert_eq!([0, 1, 2].map(|slot| at_slot(&listeners, slot)), [0, 1, 2]);
    });
}

#[test]
fn the_kernel_tells_whether_replacing_a_program_is_safe() {
    match has_rcu_fix() {
        Some(is_fixed) => assert_eq!(
            is_fixed,
            std::fs::read_to_string("/proc/kallsyms").unwrap().contains(" sk_reuseport_prog_free_rcu")
        ),
        None => skip("/proc/kallsyms is hidden here"),
    }
}
