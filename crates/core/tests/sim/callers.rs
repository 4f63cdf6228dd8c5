//! The part of the judge that watches clients that wait: each gets one answer, and the right one.

use reuseportd_core::{
    Asked, Command, Event, Generation, Number, Outcome, Reason, Receipt, Report, Ticket, Trigger, Wait,
};
use std::collections::BTreeMap;

/// What a client waits for.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// The outcome of the wish with this number.
    Upgrade(u64, Wait),
    Back,
    /// After so many changes of the number.
    Scale(Number, usize),
    Replace,
    Stop,
}

/// What is known of an upgrade that has ended.
#[derive(Clone, Copy, Debug)]
struct Ended {
    wish: u64,
    trigger: Trigger,
    outcome: Outcome,
    is_final: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Callers {
    waiting: BTreeMap<Ticket, Kind>,
    /// The number of the latest wish.
    wishes: u64,
    /// Which of them each generation is.
    carried_out: BTreeMap<Generation, u64>,
    ended: BTreeMap<u32, Ended>,
    /// The latest wish when somebody wanted the present upgrade taken back.
    taken_back: Option<u64>,
    /// So many seats there were from then on, and whether those were more than before.
    scaled: Vec<(u16, bool)>,
}

impl Callers {
    pub(crate) fn is_quiet(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Clients went with the master.
    pub(crate) fn forget(&mut self) {
        self.waiting.clear();
    }

    fn waits(&mut self, ticket: Option<Ticket>, kind: Kind) {
        self.waiting.extend(ticket.map(|ticket| (ticket, kind)));
    }

    pub(crate) fn event(&mut self, event: &Event) {
        match event {
            Event::Upgrade { by, .. } => {
                self.wishes += 1;
                if let Some((ticket, wait)) = by {
                    self.waits(Some(*ticket), Kind::Upgrade(self.wishes, *wait));
                }
            }
            Event::TakeBack { by } => {
                self.taken_back = Some(self.wishes);
                self.waits(*by, Kind::Back);
            }
            Event::Scale { to, by } => self.waits(*by, Kind::Scale(*to, self.scaled.len())),
            Event::Replace { by, .. } => self.waits(*by, Kind::Replace),
            Event::Stop { by, .. } => self.waits(*by, Kind::Stop),
            _ => {}
        }
    }

    fn answered(&mut self, to: Ticket) -> Kind {
        let Some(kind) = self.waiting.remove(&to) else { panic!("{to:?} was answered twice") };
        kind
    }

    /// With so many workers that serve.
    pub(crate) fn command(&mut self, command: &Command, serving: u16) {
        match command {
            Command::Reply { to, receipt, asked } => self.replied(*to, *receipt, *asked),
            Command::ReplyDone { to, failure } => match (self.answered(*to), failure) {
                (Kind::Back, failure) => assert_eq!(*failure, Some(Reason::TooLate), "{command:?}"),
                (Kind::Scale(Number::Exactly(wanted), asked), None) => {
                    let since = &self.scaled[asked..];
                    let was_so = since.iter().any(|(workers, _)| *workers == wanted);
                    // Fewer are so many at once.
                    let is_fewer = since.contains(&(wanted, false));
                    let is_more = since.last() == Some(&(wanted, true));
                    let is_so = serving == wanted || (was_so && (!is_more || is_fewer));
                    assert!(is_so, "{command:?} to one who wants {wanted}, but {serving} serve");
                }
                (Kind::Scale(..) | Kind::Replace, _) => {}
                (kind, _) => panic!("{command:?} to one who asked for {kind:?}"),
            },
            Command::ReplyStopped { to } => {
                let kind = self.answered(*to);
                assert!(matches!(kind, Kind::Stop), "{command:?} to one who asked for {kind:?}");
            }
            Command::Exit { .. } => assert!(self.waiting.is_empty(), "never answered: {:?}", self.waiting),
            _ => {}
        }
    }

    fn replied(&mut self, to: Ticket, receipt: u32, asked: Asked) {
        let kind = self.answered(to);
        let Some(ended) = self.ended.get(&receipt).copied() else {
            panic!("{to:?} gets receipt {receipt}, which was never reported")
        };
        let is_right = match (kind, asked) {
            (Kind::Upgrade(wish, _), Asked::This) => ended.wish == wish,
            // A later one took its place, or the one that was under way was taken back for it.
            (Kind::Upgrade(wish, _), Asked::Earlier) => {
                ended.wish > wish || (ended.wish < wish && self.taken_back.is_some_and(|back| back >= wish))
            }
            (Kind::Back, Asked::Back) => {
                ended.outcome == Outcome::RolledBack && ended.trigger != Trigger::Rollback
            }
            // Another one had asked for the same.
            (Kind::Back, Asked::This) => ended.trigger == Trigger::Rollback,
            _ => false,
        };
        assert!(is_right, "{to:?}, who asked for {kind:?}, gets {ended:?} as {asked:?}");
        let waits_on = matches!(kind, Kind::Upgrade(_, Wait::Drained)) && ended.outcome == Outcome::Completed;
        assert!(!waits_on || ended.is_final, "{to:?} was told before the old generation was gone: {ended:?}");
    }

    /// The generation that serves has so many seats.
    pub(crate) fn report(&mut self, report: &Report, seats: u16) {
        match report {
            Report::Launching(generation, _) => {
                self.carried_out.insert(*generation, self.wishes);
            }
            Report::Ended(receipt) => self.ended(receipt),
            Report::Scaled(_, workers) => {
                self.scaled.push((*workers, *workers > seats));
            }
            _ => {}
        }
    }

    fn ended(&mut self, receipt: &Receipt) {
        let carried_out = |to| self.carried_out.get(&to).copied();
        let wish = receipt.to.map_or(Some(self.wishes), carried_out);
        let Some(wish) = wish else { panic!("the end of what never began: {receipt:?}") };
        let before = self.ended.get(&receipt.serial);
        assert!(before.is_none_or(|before| before.wish == wish && !before.is_final), "{receipt:?}");
        let ended =
            Ended { wish, trigger: receipt.trigger, outcome: receipt.outcome, is_final: receipt.is_final };
        self.ended.insert(receipt.serial, ended);
    }
}
