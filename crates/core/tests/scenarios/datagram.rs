//! Sockets that take datagrams, and flows that stay where they began.

use crate::shell::{GROUP, Shell};
use crate::{KILLED, SECOND, serve, signal, spawn, stop};
use reuseportd_core::{
    Command, Engine, Event, Exit, Generation, GenerationState, GroupView, ListenerId, MasterState, Member,
    Number, Outcome, Plan, Policy, Problem, Readiness, Reason, Report, Seat, Signal, StopMode, Ticket,
    Trigger, Verdict, Wait, WorkerId,
};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);
const BOTH: [Engine; 2] = [Engine::Ebpf, Engine::Cbpf];

fn taking_datagrams(workers: u16) -> Plan {
    Plan { datagram_groups: vec![GROUP], ..Shell::plan(workers) }
}

/// Flows stay with their generation as long as they are not idle for [`TIMEOUT`].
fn keeping_flows(workers: u16) -> Plan {
    Plan { flow_groups: vec![(GROUP, TIMEOUT)], ..taking_datagrams(workers) }
}

fn serving(engine: Engine, plan: &Plan) -> Shell {
    let mut shell = Shell::new(engine);
    shell.takes_datagrams = true;
    shell.launch(plan.clone(), Trigger::Start);
    shell.all_ready(1..=u32::from(plan.workers));
    shell.said.clear();
    shell
}

/// The same with workers that know nothing of the master.
fn unaware(engine: Engine, plan: &Plan) -> Shell {
    let mut shell = Shell::new(engine);
    shell.launch(plan.clone(), Trigger::Start);
    for worker in 1..=u32::from(plan.workers) {
        shell.listens(worker);
    }
    shell
}

/// A generation on its way out, flows of which go on.
fn left_with_flows(workers: u16) -> Shell {
    let plan = keeping_flows(workers);
    let mut shell = serving(Engine::Ebpf, &plan);
    shell.quiet = Some(Duration::ZERO);
    let by = Some((Ticket(1), Wait::Retired));
    shell.tell(Event::Upgrade { plan, trigger: Trigger::Command, by });
    let workers = u32::from(workers);
    shell.all_ready(workers + 1..=2 * workers);
    shell.pass(SECOND);
    shell
}

fn discard(listener: u32) -> Command {
    Command::Discard { listener: ListenerId(listener), group: GROUP, generation: Generation(1) }
}

fn lost(count: u32) -> Command {
    Command::Report(Report::DatagramsLost(GROUP, count))
}

impl Shell {
    fn state_of(&self, generation: u32) -> Option<GenerationState> {
        let status = self.master.status();
        status.generations.iter().find(|view| view.generation.0 == generation).map(|view| view.state)
    }

    fn evicted(&self) -> usize {
        self.said.iter().filter(|said| matches!(said, Command::Evict { .. })).count()
    }

    fn says(&self, is_it: impl Fn(&Command) -> bool) -> bool {
        self.said.iter().any(is_it)
    }
}

#[test]
fn an_upgrade_listens_on_nothing_and_counts_what_is_left() {
    for engine in BOTH {
        let mut shell = serving(engine, &taking_datagrams(2));
        shell.launch(taking_datagrams(2), Trigger::Signal);
        shell.all_ready(3..=4);
        assert!(!shell.has_said(&stop(1)), "{engine:?}");
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(1)) && shell.has_said(&stop(2)), "{engine:?}");
        assert!(!shell.says(|said| matches!(said, Command::Listen { .. })), "{engine:?}");
        shell.drains(1);
        shell.drains(2);
        shell.pass(SECOND);
        let release = |listener| shell.place(&crate::release(listener));
        assert!(shell.place(&discard(1)) < release(1) && shell.place(&discard(2)) < release(2));
        assert!(!shell.says(|said| matches!(said, Command::Report(Report::DatagramsLost(..)))));
        assert_eq!(shell.receipt().outcome, Outcome::Completed, "{engine:?}");
    }
}

#[test]
fn an_unmodified_worker_is_told_to_stop_when_nothing_waits() {
    for engine in BOTH {
        let mut shell = unaware(engine, &taking_datagrams(1));
        shell.queued = 768;
        shell.launch(taking_datagrams(1), Trigger::Signal);
        shell.listens(2);
        shell.pass(SECOND * 5);
        assert!(!shell.has_said(&signal(1, Signal::Stop)), "{engine:?}");
        shell.queued = 0;
        shell.pass(SECOND * 5);
        assert!(shell.has_said(&signal(1, Signal::Stop)), "{engine:?}");
    }
}

#[test]
fn what_a_slow_worker_has_not_read_yet_is_not_thrown_away() {
    for engine in BOTH {
        let mut shell = serving(engine, &taking_datagrams(1));
        shell.queued = 768;
        shell.launch(taking_datagrams(1), Trigger::Signal);
        shell.ready(2);
        shell.pass(SECOND * 10);
        assert!(shell.has_said(&stop(1)) && !shell.has_said(&discard(1)), "{engine:?}");
        assert!(!shell.says(|said| matches!(said, Command::Anchor { .. })), "{engine:?}: it is held");
        shell.queued = 0;
        shell.drains(1);
        shell.pass(SECOND);
        assert!(shell.has_said(&discard(1)), "{engine:?}");
    }
}

/// It can't be shut down: its slot would not go with the handle.
#[test]
fn by_slot_a_socket_is_held_until_its_worker_has_closed_it() {
    let mut shell = unaware(Engine::Cbpf, &taking_datagrams(1));
    shell.launch(taking_datagrams(1), Trigger::Signal);
    shell.listens(2);
    shell.pass(SECOND * 10);
    assert!(shell.has_said(&signal(1, Signal::Stop)) && shell.released().is_empty());
    shell.owners.retain(|_, owner| *owner != 1);
    shell.pass(SECOND);
    assert_eq!(shell.released(), [1]);
}

#[test]
fn by_slot_nothing_leaves_while_a_worker_may_bind_and_what_others_hold_keeps_its_slot() {
    for (is_kept, slots) in [(false, vec![0, 1, 2]), (true, vec![1, 2, 3])] {
        let mut shell = serving(Engine::Cbpf, &taking_datagrams(3));
        shell.is_kept = is_kept;
        shell.exits(1, KILLED);
        shell.pass(SECOND * 5);
        assert!(shell.released().is_empty(), "one that starts joins by binding");
        shell.ready(4);
        shell.pass(SECOND);
        assert_eq!((shell.released(), shell.attached().pop()), (vec![1], Some(slots)));
    }
}

#[test]
fn what_a_killed_worker_left_is_counted() {
    for engine in BOTH {
        let mut shell = serving(engine, &taking_datagrams(2));
        (shell.unread, shell.queued) = (3, 3 * 768);
        shell.exits(1, KILLED);
        shell.ready(3);
        shell.pass(SECOND);
        assert!(shell.has_said(&spawn(3, 1, 0)) && shell.has_said(&lost(3)), "{engine:?}");
        assert!(!shell.says(|said| matches!(said, Command::Report(Report::LeftoversLost(..)))));
        let take = |said: &Command| matches!(said, Command::Tell { worker: WorkerId(2), .. });
        assert!(!shell.says(take), "{engine:?}: nobody accepts a datagram for another");
    }
}

#[test]
fn what_is_lost_in_an_upgrade_is_in_its_receipt() {
    let mut shell = left_with_flows(1);
    shell.unread = 2;
    shell.exits(1, KILLED);
    shell.pass(SECOND);
    assert!(shell.has_said(&lost(2)));
    let receipt = shell.receipt();
    assert_eq!((receipt.is_final, receipt.listeners[0].leftovers_lost), (true, 2));
}

#[test]
fn an_upgrade_is_complete_while_flows_go_on_and_they_keep_their_worker() {
    let mut shell = left_with_flows(2);
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
    assert!(shell.says(|said| matches!(said, Command::Reply { to: Ticket(1), .. })));
    assert_eq!(shell.master.state(), MasterState::Steady);
    assert_eq!(shell.state_of(1), Some(GenerationState::Draining));
    shell.pass(SECOND * 50);
    assert!(!shell.has_said(&stop(1)) && !shell.has_said(&stop(2)));
    assert_eq!((shell.evicted(), shell.released().len()), (0, 0));
}

#[test]
fn idle_flows_end_and_the_worker_is_told_to_stop() {
    let mut shell = left_with_flows(1);
    shell.quiet = Some(TIMEOUT - SECOND);
    shell.pass(SECOND * 3);
    assert!(!shell.has_said(&stop(1)) && shell.evicted() == 0);
    shell.quiet = Some(TIMEOUT);
    shell.pass(SECOND * 2);
    let evict = Command::Evict { group: GROUP, key: 0 };
    assert!(shell.place(&evict) < shell.place(&stop(1)));
    shell.drains(1);
    shell.pass(SECOND);
    shell.exits(1, Exit::Code(0));
    assert!(shell.has_said(&Command::Report(Report::Drained(Generation(1)))) && shell.receipt().is_final);
}

#[test]
fn an_unmodified_worker_reads_what_its_flows_sent_last() {
    let mut shell = unaware(Engine::Ebpf, &keeping_flows(1));
    shell.quiet = Some(Duration::ZERO);
    shell.launch(keeping_flows(1), Trigger::Signal);
    shell.listens(2);
    shell.pass(SECOND);
    (shell.quiet, shell.queued) = (Some(TIMEOUT), 768);
    shell.pass(SECOND * 3);
    assert!(shell.evicted() == 1 && !shell.has_said(&signal(1, Signal::Stop)));
    shell.queued = 0;
    shell.pass(SECOND * 5);
    assert!(shell.has_said(&signal(1, Signal::Stop)));
}

/// What the look showed that found the flows idle may be older than what they sent last.
#[test]
fn between_the_end_of_flows_and_the_stop_there_is_another_look() {
    let mut shell = unaware(Engine::Ebpf, &keeping_flows(1));
    shell.quiet = Some(Duration::ZERO);
    shell.launch(keeping_flows(1), Trigger::Signal);
    shell.listens(2);
    shell.pass(SECOND);
    shell.quiet = Some(TIMEOUT);
    while shell.evicted() == 0 {
        shell.pass(Duration::from_millis(1));
    }
    shell.queued = 768;
    shell.pass(SECOND);
    assert!(!shell.has_said(&signal(1, Signal::Stop)));
}

#[test]
fn flows_that_never_end_do_so_shortly_before_the_drain_does() {
    let mut shell = left_with_flows(1);
    shell.pass(Duration::from_millis(57_900));
    assert!(!shell.has_said(&stop(1)) && shell.evicted() == 0);
    shell.pass(Duration::from_millis(200));
    assert!(shell.has_said(&stop(1)) && shell.evicted() == 1, "with time left to read what they sent");
    assert!(!shell.has_said(&signal(1, Signal::KillGroup)));
}

/// Those that the generation before wanted kept.
#[test]
fn a_generation_that_is_taken_back_and_keeps_no_flows_gets_none_any_more() {
    let mut shell = serving(Engine::Ebpf, &keeping_flows(1));
    shell.quiet = Some(Duration::ZERO);
    shell.launch(Plan { bake: SECOND * 60, ..taking_datagrams(1) }, Trigger::Command);
    shell.ready(2);
    shell.tell(Event::TakeBack { by: None });
    shell.pass(SECOND);
    let evict = Command::Evict { group: GROUP, key: 1024 };
    assert!(shell.place(&evict) < shell.place(&stop(2)));
}

#[test]
fn batches_go_on_while_flows_of_the_seats_before_do() {
    let mut shell = serving(Engine::Ebpf, &keeping_flows(2));
    shell.quiet = Some(Duration::ZERO);
    shell.launch(Plan { batch: Some(1), ..keeping_flows(2) }, Trigger::Command);
    shell.ready(3);
    shell.pass(SECOND);
    assert!(shell.has_said(&spawn(4, 2, 1)));
    shell.ready(4);
    shell.pass(SECOND);
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
    assert!(!shell.has_said(&stop(1)) && !shell.has_said(&stop(2)) && shell.evicted() == 0);
}

#[test]
fn removed_seats_keep_their_flows_and_whoever_waits_is_told() {
    let mut shell = serving(Engine::Ebpf, &keeping_flows(2));
    shell.quiet = Some(Duration::ZERO);
    shell.tell(Event::Scale { to: Number::Exactly(1), by: Some(Ticket(1)) });
    shell.pass(SECOND);
    assert!(shell.has_said(&Command::ReplyDone { to: Ticket(1), failure: None }));
    assert!(!shell.has_said(&stop(2)) && shell.evicted() == 0);
    shell.quiet = Some(TIMEOUT);
    shell.pass(SECOND * 2);
    assert!(shell.has_said(&stop(2)) && shell.evicted() == 1);
}

#[test]
fn a_stop_does_not_wait_for_flows() {
    let mut shell = left_with_flows(1);
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
    shell.pass(SECOND * 2);
    assert!(shell.has_said(&stop(1)) && shell.has_said(&stop(2)));
}

#[test]
fn every_socket_is_held_while_its_worker_serves() {
    for engine in BOTH {
        let mut shell = unaware(engine, &taking_datagrams(3));
        shell.pass(SECOND * 10);
        assert!(shell.released().is_empty(), "{engine:?}");
        assert!(!shell.says(|said| matches!(said, Command::Anchor { .. })), "{engine:?}");
    }
}

#[test]
fn a_worker_that_closes_its_socket_unasked_is_found_and_replaced() {
    for engine in BOTH {
        let mut shell = unaware(engine, &taking_datagrams(2));
        shell.owners.retain(|_, owner| *owner != 2);
        shell.unread = 5;
        shell.pass(SECOND * 2);
        let reason = Reason::WrongListeners(Seat(1), WorkerId(2), Problem::NotListening(GROUP));
        assert!(shell.has_said(&Command::Report(Report::Replaced(WorkerId(2), reason))), "{engine:?}");
        shell.exits(2, Exit::Signal(15));
        shell.listens(3);
        shell.pass(SECOND);
        assert!(shell.has_said(&lost(5)) && shell.has_said(&spawn(3, 1, 1)), "{engine:?}");
    }
}

#[test]
fn a_worker_whose_sockets_were_found_before_it_spoke_is_what_it_says() {
    let mut shell = Shell::new(Engine::Ebpf);
    shell.launch(Plan { readiness: Readiness::Listen, ..taking_datagrams(1) }, Trigger::Start);
    shell.verdict = Verdict::Waiting;
    shell.listens(1);
    let listeners = vec![(GROUP, ListenerId(1))];
    shell.tell(Event::Ready { worker: WorkerId(1), listeners });
    assert!(shell.has_said(&serve(1)) && shell.released().is_empty());
    assert_eq!(shell.master.state(), MasterState::Steady);
}

/// All it has are sockets that its workers share: nothing is steered, and nothing looked at.
#[test]
fn an_app_without_a_group_is_launched_taken_back_upgraded_and_stopped() {
    for engine in [Engine::Ebpf, Engine::Cbpf, Engine::None] {
        let plan = Plan { groups: Vec::new(), ..Shell::plan(1) };
        let mut shell = Shell::new(engine);
        shell.launch(plan.clone(), Trigger::Start);
        shell.seated(1);
        assert_eq!(shell.master.state(), MasterState::Steady, "{engine:?}");
        assert_eq!(shell.master.status().generations[0].share, 1000);
        shell.launch(Plan { bake: SECOND * 10, ..plan.clone() }, Trigger::Command);
        shell.seated(2);
        shell.tell(Event::TakeBack { by: None });
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(2)) && !shell.has_said(&stop(1)), "{engine:?}");
        shell.exits(2, Exit::Code(0));
        assert_eq!(shell.receipt().outcome, Outcome::RolledBack, "{engine:?}");
        shell.launch(plan, Trigger::Command);
        shell.seated(3);
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(1)), "{engine:?}");
        shell.exits(1, Exit::Code(0));
        assert_eq!(shell.receipt().outcome, Outcome::Completed, "{engine:?}");
        shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(3)), "{engine:?}");
        shell.exits(3, Exit::Code(0));
        assert!(shell.has_said(&Command::Exit { code: 0 }), "{engine:?}");
        assert!(!shell.says(|said| matches!(said, Command::Observe { .. })), "{engine:?}");
    }
}

#[test]
fn each_processor_has_its_seat_and_that_of_a_dead_worker_is_served_by_another() {
    let plan = Plan { policy: Policy::Cpu, ..Shell::plan(3) };
    let mut shell = serving(Engine::Cbpf, &plan);
    shell.exits(2, KILLED);
    let slots = shell.attached().pop().unwrap();
    assert_eq!((slots.len(), slots[0], slots[2]), (3, 0, 2), "{slots:?}");
    assert!([0, 2].contains(&slots[1]), "{slots:?}");
    let mut shell = Shell::new(Engine::Ebpf);
    shell.launch(plan, Trigger::Start);
    shell.all_ready(1..=3);
    let steps = |said: &Command| match said {
        Command::Steer { ranges, .. } => Some((ranges[0].count, ranges[0].step)),
        _ => None,
    };
    assert_eq!(shell.said.iter().find_map(steps), Some((3, 1)));
}

#[test]
fn a_worker_whose_socket_nobody_holds_any_more_is_replaced() {
    for engine in BOTH {
        let mut shell = unaware(engine, &taking_datagrams(2));
        shell.is_succeeded(&[1]);
        assert!(shell.has_said(&signal(1, Signal::Stop)) && !shell.has_said(&signal(2, Signal::Stop)));
    }
}

#[test]
fn what_nobody_has_looked_at_is_neither_idle_nor_empty() {
    for (plan, keeps_flows) in [(keeping_flows(1), true), (taking_datagrams(1), false)] {
        let mut shell = unaware(Engine::Ebpf, &plan);
        let members = [1, 2].map(|id| Member { cookie: u64::from(id), listener: Some(ListenerId(id)) });
        shell.shown = Some(GroupView { members: members.to_vec(), ..GroupView::default() });
        shell.launch(plan, Trigger::Signal);
        shell.listens(2);
        shell.pass(SECOND * 5);
        assert!(!shell.has_said(&signal(1, Signal::Stop)));
        assert!(shell.evicted() == 0 || !keeps_flows, "where none are kept, none can be alive");
    }
}

#[test]
fn a_key_that_could_not_be_given_to_the_next_worker_is_still_the_former_ones() {
    let mut shell = serving(Engine::Ebpf, &keeping_flows(1));
    shell.quiet = Some(Duration::ZERO);
    shell.tell(Event::Replace { seat: Seat(0), by: None });
    shell.admits = Err(12);
    shell.ready(2);
    shell.pass(SECOND / 2);
    assert!(!shell.has_said(&stop(1)), "flows go on there");
    shell.admits = Ok(());
    shell.pass(SECOND * 2);
    assert!(shell.has_said(&stop(1)), "the next one has the key, and what comes");
}
