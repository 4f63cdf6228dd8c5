//! The simulated kernel against what was measured on the real one. The sys crate asserts the same of the real one.

use crate::kernel::{Choice, Holder, Kernel, Program};
use crate::rng::Rng;
use reuseportd_core::{Generation, GroupId, ListenerId, Policy, Range, Share, WorkerId};
use std::collections::BTreeSet;

const GROUP: GroupId = GroupId(0);

/// So many listening sockets, each of another worker.
fn group_of(count: u32) -> (Kernel, Vec<ListenerId>, Rng) {
    let mut kernel = Kernel::default();
    let bind = |n| kernel.bind(GROUP, Some(WorkerId(n)), Holder::Leader(WorkerId(n)));
    let listeners: Vec<ListenerId> = (1..=count).map(bind).collect();
    for listener in &listeners {
        assert_eq!(kernel.listen(*listener), Ok(()));
    }
    (kernel, listeners, Rng::new(1))
}

/// Who is chosen, over many connections.
fn chosen(kernel: &mut Kernel, rng: &mut Rng) -> BTreeSet<ListenerId> {
    let mut all = BTreeSet::new();
    for _ in 0..200 {
        match kernel.syn(GROUP, rng).1 {
            Choice::Named(listener) | Choice::Known(listener) | Choice::Hashed(listener) => {
                all.insert(listener);
            }
            Choice::Refused => {}
        }
    }
    all
}

fn steer_to_slot(kernel: &mut Kernel, slot: u16) {
    kernel.group(GROUP).program =
        Program::Slots(vec![Share { weight: 1000, slots: vec![slot], policy: Policy::Hash }]);
}

#[test]
fn slots_follow_listen_and_the_last_moves_into_the_hole() {
    let (mut kernel, listeners, mut rng) = group_of(4);
    kernel.bind(GROUP, Some(WorkerId(9)), Holder::Leader(WorkerId(9)));
    steer_to_slot(&mut kernel, 3);
    assert_eq!(chosen(&mut kernel, &mut rng), BTreeSet::from([listeners[3]]), "a bound socket has no slot");
    kernel.forget(Holder::Leader(WorkerId(1)), &mut rng);
    assert_eq!(chosen(&mut kernel, &mut rng).len(), 3, "out of range: hashed over all");
    steer_to_slot(&mut kernel, 0);
    assert_eq!(chosen(&mut kernel, &mut rng), BTreeSet::from([listeners[3]]));
    let by_age: Vec<u64> = kernel.observe(GROUP, 0).members.iter().map(|member| member.cookie).collect();
    assert!(by_age.is_sorted(), "listed by age, not by slot: {by_age:?}");
}

#[test]
fn what_waits_is_reset_unless_it_migrates_or_somebody_holds_the_socket() {
    for (by_hash, held, lost) in [(false, false, 5), (true, false, 0), (false, true, 0)] {
        let (mut kernel, listeners, mut rng) = group_of(2);
        kernel.migrates_by_hash = by_hash;
        steer_to_slot(&mut kernel, 0);
        for n in 0..5 {
            let (connection, _) = kernel.syn(GROUP, &mut rng);
            if n > 1 {
                kernel.finish(connection);
            }
        }
        if held && let Some(socket) = kernel.sockets.get_mut(&listeners[0]) {
            socket.holders.insert(Holder::Master);
        }
        kernel.forget(Holder::Leader(WorkerId(1)), &mut rng);
        assert_eq!(kernel.losses.len(), lost, "migrates by hash: {by_hash}, held: {held}");
    }
}

#[test]
fn keys_wrap_over_holes_fall_through_to_others_and_migrate() {
    let (mut kernel, listeners, mut rng) = group_of(3);
    let range = |base| Range { generation: Generation(1), weight: 1000, base, count: 4, step: 0 };
    assert_eq!(kernel.admit(listeners[1], 2), Ok(()));
    kernel.group(GROUP).program = Program::Ranges(vec![range(0)]);
    assert_eq!(chosen(&mut kernel, &mut rng), BTreeSet::from([listeners[1]]), "the only key in the range");
    kernel.group(GROUP).program = Program::Ranges(vec![range(4)]);
    assert_eq!(chosen(&mut kernel, &mut rng).len(), 3, "an empty range: hashed over all");
    kernel.forget(Holder::Leader(WorkerId(2)), &mut rng);
    assert!(kernel.losses.is_empty(), "the kernel moved them");
    kernel.group(GROUP).program = Program::Ranges(Vec::new());
    assert_eq!(kernel.syn(GROUP, &mut rng).1, Choice::Refused, "no range refuses");
}
