//! A master in the place of one that was killed: with its memory, which may be older than what is, or with none.

use crate::shell::{GROUP, Shell};
use crate::{KILLED, SECOND, serve, signal, spawn, stop};
use reuseportd_core::{
    Command, Engine, Event, Exit, Found, Generation, GroupId, ListenerId, MasterState, Notice, Outcome, Plan,
    Readiness, Reason, Report, Seat, Signal, StopMode, Ticket, Trigger, Wait, WorkerId,
};

impl Shell {
    /// The master is killed; another goes on with its memory, but without these handles.
    pub(crate) fn is_succeeded(&mut self, lost: &[u32]) {
        self.go_on_from_text();
        self.said.clear();
        self.tell(Event::Adopted { lost: lost.iter().copied().map(ListenerId).collect() });
    }

    /// Processes 1 to `found.len()` are found, each with a listener in the group or without.
    fn with_orphans(engine: Engine, found: &[bool]) -> Shell {
        Shell::with_orphans_in(engine, found, Vec::new())
    }

    /// The journal says of the group's slots that these listeners have them.
    fn with_orphans_in(engine: Engine, found: &[bool], slots: Vec<(GroupId, Vec<u64>)>) -> Shell {
        let mut shell = Shell::new(engine);
        let mut workers = Vec::new();
        for (id, has_handle) in (1..).zip(found) {
            let listener = has_handle.then(|| (GROUP, shell.found(id)));
            workers.push((WorkerId(id), listener.into_iter().collect()));
        }
        let plan = Shell::plan_of_seats(u16::try_from(found.len()).unwrap_or(u16::MAX));
        shell.tell(Event::Orphans { generation: Generation(7), plan, workers, slots });
        shell
    }

    /// A listener that the worker made, and listens with.
    fn found(&mut self, worker: u32) -> ListenerId {
        self.listeners += 1;
        let listener = ListenerId(self.listeners);
        self.owners.insert(listener, worker);
        self.members.push(listener);
        listener
    }

    /// What another master would read.
    fn go_on_from_text(&mut self) {
        let read = serde_json::to_string(&self.master).and_then(|text| serde_json::from_str(&text));
        match read {
            Ok(master) => self.master = master,
            Err(error) => panic!("{error}"),
        }
    }

    /// An unmodified worker has started, and this is its listener.
    pub(crate) fn listens(&mut self, worker: u32) -> ListenerId {
        let listener = self.found(worker);
        let found = Found::All(vec![(GROUP, listener)]);
        self.tell(Event::Found { worker: WorkerId(worker), found });
        listener
    }

    /// A service of so many unmodified workers.
    fn unmodified(workers: u16) -> Shell {
        let mut shell = Shell::new(Engine::Ebpf);
        let plan = Plan { readiness: Readiness::Listen, ..Shell::plan(workers) };
        shell.launch(plan, Trigger::Start);
        for worker in 1..=u32::from(workers) {
            shell.listens(worker);
        }
        shell.said.clear();
        shell
    }
}

fn listen(listener: u32) -> Command {
    Command::Listen { listener: ListenerId(listener) }
}

#[test]
fn a_worker_is_chosen_only_when_the_next_master_would_know_it() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.keeps = false;
    shell.exits(1, KILLED);
    shell.ready(2);
    assert!(shell.has_said(&Command::Save) && !shell.has_said(&listen(2)));
    shell.tell(Event::Saved);
    assert!(shell.has_said(&listen(2)) && shell.has_said(&serve(2)));
    shell.tell(Event::Saved);
    shell.upgrade(1, Trigger::Signal);
    shell.ready(3);
    assert!(!shell.has_said(&listen(3)));
    shell.tell(Event::Saved);
    assert!(shell.has_said(&listen(3)));
}

#[test]
fn nobody_is_told_to_stop_before_the_next_master_would_know_of_the_switch() {
    for engine in [Engine::Ebpf, Engine::Cbpf, Engine::None] {
        let mut shell = Shell::serving(engine, 1);
        shell.keeps = false;
        shell.upgrade(1, Trigger::Signal);
        shell.ready(2);
        shell.tell(Event::Saved);
        // It serves, and may be chosen.
        shell.pass(SECOND);
        assert_eq!(shell.master.status().active, Some(Generation(1)), "{engine:?}");
        shell.tell(Event::Saved);
        shell.pass(SECOND);
        assert_eq!(shell.master.status().active, Some(Generation(2)), "{engine:?}");
        assert!(!shell.has_said(&stop(1)), "{engine:?}");
        shell.tell(Event::Saved);
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(1)), "{engine:?}");
    }
}

#[test]
fn a_generation_that_the_last_master_may_have_steered_to_is_not_ended_as_one_that_never_served() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 2);
        shell.upgrade(2, Trigger::Signal);
        shell.ready(3);
        shell.keeps = false;
        shell.ready(4);
        shell.tell(Event::Saved);
        assert_eq!(shell.master.state(), MasterState::Launching, "{engine:?}");
        // From what is kept now the last master went on.
        shell.is_succeeded(&[]);
        shell.exits(4, KILLED);
        assert!(!shell.has_said(&signal(3, Signal::Stop)), "{engine:?}");
        assert_eq!(shell.master.status().active, Some(Generation(2)), "{engine:?}");
    }
}

#[test]
fn whoever_is_to_be_chosen_is_put_into_the_array_again_by_the_next_master() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.is_succeeded(&[]);
    let admit = |listener, key| Command::Admit { listener: ListenerId(listener), key };
    let is_steering = |said: &Command| matches!(said, Command::Steer { .. });
    let steered = shell.said.iter().position(is_steering);
    assert!(Some(shell.place(&admit(1, 0)).max(shell.place(&admit(2, 1)))) < steered);
}

#[test]
fn slots_are_left_one_by_one_so_that_the_next_master_can_tell_whose_they_are() {
    let mut shell = Shell::serving(Engine::Cbpf, 2);
    shell.upgrade(2, Trigger::Signal);
    shell.ready(3);
    shell.ready(4);
    shell.pass(SECOND);
    shell.keeps = false;
    shell.said.clear();
    shell.drains(1);
    shell.drains(2);
    shell.pass(SECOND);
    assert_eq!(shell.released().len(), 1);
    shell.tell(Event::Saved);
    assert_eq!(shell.released().len(), 2);
}

#[test]
fn the_next_master_steers_again_and_then_empties_keys_that_it_does_not_know() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.is_succeeded(&[]);
    let kept = Command::KeepKeys { group: GROUP, kept: vec![0, 1] };
    assert!(shell.steered_to(1) < shell.place(&kept));
    assert!(shell.has_said(&Command::Notify(Notice::Ready)));
    assert!(!shell.has_said(&stop(1)) && !shell.has_said(&signal(1, Signal::Stop)));
    shell.steers = Err(12);
    shell.is_succeeded(&[]);
    assert!(!shell.has_said(&kept), "as long as the program in force may name them");
    shell.steers = Ok(());
    shell.pass(SECOND);
    assert!(shell.has_said(&kept));
}

#[test]
fn keys_that_it_does_not_know_stay_until_there_is_somebody_else() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.keeps = false;
    shell.exits(1, KILLED);
    shell.ready(2);
    // The old master had put it in the dead one's place, and let go of that, but its keeper does not know.
    shell.said.clear();
    shell.is_succeeded(&[1]);
    let kept = Command::KeepKeys { group: GROUP, kept: vec![0] };
    let admitted = Command::Admit { listener: ListenerId(2), key: 0 };
    assert!(shell.place(&admitted) < shell.place(&kept));
    let empties = |said: &&Command| matches!(said, Command::KeepKeys { .. });
    assert_eq!(shell.said.iter().filter(empties).count(), 1);
}

#[test]
fn clients_of_the_old_master_get_no_answer_from_the_next() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    let by = Some((Ticket(1), Wait::Retired));
    shell.tell(Event::Upgrade { plan: Shell::plan(1), trigger: Trigger::Command, by });
    shell.tell(Event::Reexec { by: Some(Ticket(2)) });
    shell.is_succeeded(&[]);
    shell.ready(2);
    shell.pass(SECOND);
    shell.drains(1);
    shell.pass(SECOND);
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
    let answers = |said: &Command| matches!(said, Command::Reply { .. } | Command::ReplyReexec { .. });
    assert!(!shell.said.iter().any(answers));
    shell.tell(Event::Reexec { by: Some(Ticket(3)) });
    assert!(shell.has_said(&Command::Preflight), "the old one's preflight is forgotten");
}

#[test]
fn a_launch_whose_sockets_were_let_go_of_has_failed() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 1);
        shell.upgrade(2, Trigger::Signal);
        shell.ready(2);
        shell.is_succeeded(&[2]);
        let reason = Reason::ListenFailed(Seat(0), WorkerId(2), 9);
        assert!(shell.has_said(&Command::Report(Report::Failing(Generation(2), reason))), "{engine:?}");
        shell.exits(2, Exit::Signal(15));
        shell.exits(3, Exit::Signal(15));
        assert_eq!(shell.master.state(), MasterState::Steady, "{engine:?}");
        assert!(!shell.has_said(&listen(2)) && shell.released().is_empty(), "{engine:?}");
    }
}

/// Seeds 60732 and 63935.
#[test]
fn so_has_one_whose_seats_sockets_were_let_go_of() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving_seats(engine, 1);
        shell.launch(Shell::plan_of_seats(2), Trigger::Signal);
        shell.seated(3);
        shell.is_succeeded(&[2]);
        let reason = Reason::ListenFailed(Seat(1), WorkerId(3), 9);
        assert!(shell.has_said(&Command::Report(Report::Failing(Generation(2), reason))), "{engine:?}");
        shell.exits(2, Exit::Signal(15));
        shell.exits(3, Exit::Signal(15));
        assert_eq!(shell.master.state(), MasterState::Steady, "{engine:?}");
        shell.assert_sockets_stay();
    }
}

#[test]
fn a_worker_that_was_ready_while_nobody_listened_has_its_full_time() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.upgrade(1, Trigger::Signal);
    shell.now = shell.now.after(SECOND * 61);
    shell.is_succeeded(&[]);
    shell.tell(Event::Deadline);
    shell.ready(2);
    assert_eq!(shell.master.status().active, Some(Generation(2)));
}

#[test]
fn a_group_that_nobody_is_left_in_does_not_hold_up_anything() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.exits(1, KILLED);
    shell.tell(Event::SpawnFailed { worker: WorkerId(2), errno: 12 });
    shell.is_succeeded(&[1]);
    assert!(!shell.said.iter().any(|said| matches!(said, Command::Steer { .. })));
}

#[test]
fn an_upgrade_begins_although_a_group_could_not_be_steered_before_it_got_empty() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.steers = Err(2);
    shell.is_succeeded(&[]);
    shell.exits(1, KILLED);
    shell.tell(Event::SpawnFailed { worker: WorkerId(2), errno: 12 });
    shell.is_succeeded(&[1]);
    shell.said.clear();
    shell.upgrade(1, Trigger::Signal);
    shell.pass(SECOND * 2);
    assert!(shell.said.iter().any(|said| matches!(said, Command::Spawn { generation: Generation(2), .. })));
}

#[test]
fn orphans_serve_until_a_generation_of_the_present_program_does() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::with_orphans(engine, &[true, true, false]);
        assert!(shell.has_said(&Command::Report(Report::Adopted(3))), "{engine:?}");
        assert!(shell.has_said(&Command::Notify(Notice::Ready)), "{engine:?}");
        shell.launch(Shell::plan(1), Trigger::Orphans);
        assert!(shell.has_said(&spawn(4, 8, 0)), "{engine:?}");
        shell.ready(4);
        shell.pass(SECOND * 10);
        for worker in 1..=3 {
            assert!(shell.has_said(&signal(worker, Signal::Stop)), "{engine:?}");
            shell.exits(worker, Exit::Signal(15));
        }
        shell.pass(SECOND);
        assert_eq!(shell.receipt().outcome, Outcome::Completed, "{engine:?}");
        assert_eq!(shell.master.state(), MasterState::Steady, "{engine:?}");
        assert_eq!(shell.master.status().generations.len(), 1, "{engine:?}");
    }
}

#[test]
fn orphans_keep_the_slots_that_the_old_master_knew() {
    // One that was older than all left, and the last took its slot. The kernel lists them by age.
    let slots = vec![(GROUP, vec![3, 1, 2])];
    let mut shell = Shell::with_orphans_in(Engine::Cbpf, &[true, true, true], slots);
    shell.launch(Shell::plan(1), Trigger::Orphans);
    shell.ready(4);
    shell.pass(SECOND * 5);
    // From the end, so that only the new one moves.
    assert_eq!(shell.released(), [2, 1, 3]);
    assert_eq!(shell.attached(), [vec![0, 1, 2], vec![3], vec![2], vec![1], vec![0]]);
    assert!(!shell.has_said(&Command::Report(Report::SlotsUnsure(GROUP))));
}

#[test]
fn of_orphans_without_slots_the_master_says_that_it_guesses() {
    let unsure = Command::Report(Report::SlotsUnsure(GROUP));
    assert!(Shell::with_orphans(Engine::Cbpf, &[true, true]).has_said(&unsure));
    // Two left that the old master knew, and nobody saw in which order.
    let slots = vec![(GROUP, vec![8, 9, 1, 2])];
    assert!(Shell::with_orphans_in(Engine::Cbpf, &[true, true], slots).has_said(&unsure));
}

#[test]
fn sockets_of_seats_are_made_anew_beside_orphans() {
    let mut shell = Shell::with_orphans(Engine::Ebpf, &[true]);
    shell.launch(Shell::plan_of_seats(1), Trigger::Orphans);
    assert!(shell.said.iter().any(|said| matches!(said, Command::Bind { .. })));
    shell.seated(2);
    assert!(shell.has_said(&Command::Admit { listener: ListenerId(2), key: 7166 }));
    assert_eq!(shell.master.status().active, Some(Generation(8)));
}

#[test]
fn a_generation_that_is_taken_back_goes_although_nothing_is_known_of_who_serves() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::with_orphans(engine, &[false]);
        assert!(!shell.said.iter().any(|said| matches!(said, Command::Steer { .. })), "{engine:?}");
        shell.launch(Shell::plan(1), Trigger::Orphans);
        shell.steers = Err(1);
        shell.ready(2);
        shell.steers = Ok(());
        assert_eq!(shell.master.state(), MasterState::RollingBack, "{engine:?}");
        shell.pass(SECOND * 5);
        shell.drains(2);
        shell.exits(2, Exit::Code(0));
        shell.pass(SECOND * 5);
        assert_eq!(shell.master.state(), MasterState::Steady, "{engine:?}");
        assert!(!shell.has_said(&signal(1, Signal::Stop)), "{engine:?}");
    }
}

#[test]
fn the_last_handle_of_a_group_is_kept_until_there_is_another() {
    let mut shell = Shell::unmodified(2);
    shell.anchors = Err(9);
    // The other one has ended, too, but nobody knows yet.
    shell.exits(1, KILLED);
    assert!(shell.has_said(&Command::Anchor { listener: ListenerId(2) }));
    assert!(shell.released().is_empty());
    shell.anchors = Ok(());
    shell.pass(SECOND * 2);
    assert_eq!(shell.released(), [1], "it was asked again");
}

#[test]
fn a_respawned_worker_takes_the_key_of_one_that_left_a_process_behind() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Exited { worker: WorkerId(1), how: KILLED, remains: true });
    shell.ready(2);
    assert!(shell.has_said(&Command::Admit { listener: ListenerId(2), key: 0 }));
    assert!(!shell.said.iter().any(|said| matches!(said, Command::Evict { .. })));
}

#[test]
fn a_worker_that_was_told_to_stop_by_the_old_master_is_replaced_and_its_seats_socket_stays() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving_seats(engine, 2);
        shell.is_succeeded(&[]);
        shell.tell(Event::Drained { worker: WorkerId(1) });
        shell.exits(1, Exit::Code(0));
        shell.seated(3);
        shell.pass(SECOND * 2);
        assert!(shell.has_said(&serve(3)), "{engine:?}");
        shell.assert_sockets_stay();
    }
}

#[test]
fn a_worker_that_serves_without_a_listener_is_replaced() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 2);
        shell.is_succeeded(&[1]);
        assert!(shell.has_said(&signal(1, Signal::Stop)), "{engine:?}");
        shell.exits(1, Exit::Signal(15));
        shell.ready(3);
        assert!(shell.has_said(&serve(3)), "{engine:?}");
    }
}

#[test]
fn a_worker_is_asked_for_one_answer_at_a_time() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.launch(Plan { readiness: Readiness::Http, passes: 2, ..Shell::plan(1) }, Trigger::Signal);
    shell.answers = false;
    shell.ready(2);
    shell.pass(SECOND);
    let asked = shell.said.iter().filter(|said| matches!(said, Command::Prove { .. })).count();
    assert_eq!(asked, 1);
}

#[test]
fn a_stop_that_was_kept_goes_on() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: Some(Ticket(1)) });
    shell.is_succeeded(&[]);
    shell.pass(SECOND);
    assert!(shell.has_said(&stop(1)));
    shell.tell(Event::Exited { worker: WorkerId(1), how: Exit::Unknown, remains: false });
    assert!(shell.has_said(&Command::Exit { code: 0 }));
}

#[test]
fn the_next_master_does_not_wait_for_keys_that_nobody_confirms() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.is_unanswered = |command| matches!(command, Command::Admit { .. });
    shell.upgrade(1, Trigger::Signal);
    shell.ready(2);
    shell.pass(SECOND);
    assert_eq!(shell.master.status().active, Some(Generation(1)));
    shell.is_unanswered = |_| false;
    shell.is_succeeded(&[]);
    assert_eq!(shell.master.status().active, Some(Generation(2)));
}

#[test]
fn the_next_master_does_not_wait_for_counts_of_the_one_before() {
    let mut shell = Shell::new(Engine::Ebpf);
    shell.takes_datagrams = true;
    let plan = Plan { datagram_groups: vec![GROUP], ..Shell::plan(1) };
    shell.launch(plan.clone(), Trigger::Start);
    shell.ready(1);
    shell.is_unanswered = |command| matches!(command, Command::Discard { .. });
    shell.launch(plan, Trigger::Signal);
    shell.ready(2);
    shell.pass(SECOND);
    shell.drains(1);
    shell.exits(1, Exit::Code(0));
    let gone = Command::Report(Report::Drained(Generation(1)));
    assert!(!shell.has_said(&gone));
    shell.is_succeeded(&[]);
    shell.pass(SECOND);
    assert!(shell.has_said(&gone));
}
