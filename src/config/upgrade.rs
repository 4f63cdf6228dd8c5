//! `[upgrade]`: how a generation is replaced.

use std::ops::Range;
use std::time::Duration;

use toml::Spanned;

use super::command::check_words;
use super::problems::Problems;
use super::schema::{self, Scalar};
use super::values::{parse_duration, parse_share, quoted};
use super::{Bind, CanaryStep, EngineChoice, Listeners, StopWhen, Upgrade};

const SECOND: Duration = Duration::from_secs(1);

/// Seats in a batch at most: as many as a generation can have.
const BATCH_MAX: i64 = 1024;

/// Also of a snapshot that is older than the key.
pub(super) fn default_check_interval() -> Duration {
    2 * SECOND
}

/// Checks the table; `known` is what placeholders may name, when that is known.
pub(super) fn resolve(
    raw: &schema::Upgrade,
    engine: EngineChoice,
    listen: Listeners<'_>,
    known: Option<Listeners<'_>>,
    problems: &mut Problems,
) -> Upgrade {
    let drain_timeout = problems.wait("upgrade.drain_timeout", &raw.drain_timeout, 60 * SECOND);
    let mut within_drain = |key: &str, value: &Option<Spanned<String>>, default| {
        let time = problems.duration(key, value, default);
        if let Some(value) = value.as_ref().filter(|_| time > drain_timeout) {
            let message = format!("{time:?} is longer than upgrade.drain_timeout ({drain_timeout:?})");
            problems.add(
                key,
                Some(value.span()),
                message,
                "workers are killed after drain_timeout: make this shorter, or that longer",
            );
        }
        time
    };
    let settle_timeout = within_drain("upgrade.settle_timeout", &raw.settle_timeout, Duration::ZERO);
    let idle_timeout = within_drain("upgrade.idle_timeout", &raw.idle_timeout, 2 * SECOND);
    let stop_when = [("auto", StopWhen::Auto), ("drained", StopWhen::Drained), ("idle", StopWhen::Idle)];
    let check = raw.check.as_ref().map_or(&[][..], |check| check.get_ref());
    check_words("upgrade.check", check, None, known, problems);
    let upgrade = Upgrade {
        batch: batch(&raw.batch, problems),
        canary: canary(raw, problems),
        bake: problems.duration("upgrade.bake", &raw.bake, Duration::ZERO),
        check: check.iter().map(|word| word.get_ref().clone()).collect(),
        check_interval: problems.wait(
            "upgrade.check_interval",
            &raw.check_interval,
            default_check_interval(),
        ),
        ready_timeout: problems.wait("upgrade.ready_timeout", &raw.ready_timeout, 60 * SECOND),
        settle_timeout: raw.settle_timeout.is_some().then_some(settle_timeout),
        stop_when: problems.choice("upgrade.stop_when", &raw.stop_when, stop_when),
        idle_timeout,
        drain_timeout,
        max_draining: problems.number("upgrade.max_draining", &raw.max_draining, 1..=1024, 4),
    };
    Asked::of(raw).agree(engine, listen, problems);
    upgrade
}

/// `None` is "all".
fn batch(raw: &Option<Spanned<Scalar>>, problems: &mut Problems) -> Option<u16> {
    let raw = raw.as_ref()?;
    match raw.get_ref() {
        Scalar::Word(word) if word == "all" => return None,
        Scalar::Number(number) if (1..=BATCH_MAX).contains(number) => return u16::try_from(*number).ok(),
        Scalar::Word(_) | Scalar::Number(_) => {}
    }
    let message = format!("{} is not possible", raw.get_ref());
    let help = format!("allowed: \"all\", or a number from 1 to {BATCH_MAX}");
    problems.add("upgrade.batch", Some(raw.span()), message, help);
    None
}

fn canary(raw: &schema::Upgrade, problems: &mut Problems) -> Vec<CanaryStep> {
    let mut steps: Vec<CanaryStep> = Vec::new();
    for (index, raw) in raw.canary.iter().flat_map(|steps| steps.get_ref()).enumerate() {
        let (key, step) = (format!("upgrade.canary[{index}]"), raw.get_ref());
        let mut missing = |what: &str, example| {
            problems.add(format!("{key}.{what}"), Some(raw.span()), "missing", example);
        };
        if step.share.is_none() {
            missing("share", "for example share = \"5%\"");
        }
        if step.hold.is_none() {
            missing("hold", "how long this share lasts, for example hold = \"30s\"");
        }
        let hold = problems.wait(&format!("{key}.hold"), &step.hold, SECOND);
        let key = format!("{key}.share");
        let Some(written) = &step.share else { continue };
        let Some(share) = problems.text(&key, written, parse_share) else { continue };
        if steps.last().is_some_and(|before| before.share >= share) {
            let message = format!("{} is not more than in the step before", quoted(written.get_ref()));
            problems.add(
                key,
                Some(written.span()),
                message,
                "each step gives the new generation more than the one before: raise it, or remove the step",
            );
        }
        steps.push(CanaryStep { share, hold });
    }
    steps
}

/// The places of those keys that ask for something, whether or not what they ask is possible.
struct Asked {
    batch: Option<Range<usize>>,
    canary: Option<Range<usize>>,
    bake: Option<Range<usize>>,
    check: Option<Range<usize>>,
}

impl Asked {
    fn of(raw: &schema::Upgrade) -> Self {
        let is_all = |batch: &Scalar| *batch == Scalar::Word("all".to_owned());
        let is_zero = |bake: &str| parse_duration(bake) == Ok(Duration::ZERO);
        Asked {
            batch: raw.batch.as_ref().filter(|batch| !is_all(batch.get_ref())).map(Spanned::span),
            canary: raw.canary.as_ref().filter(|steps| !steps.get_ref().is_empty()).map(Spanned::span),
            bake: raw.bake.as_ref().filter(|bake| !is_zero(bake.get_ref())).map(Spanned::span),
            check: raw.check.as_ref().filter(|words| !words.get_ref().is_empty()).map(Spanned::span),
        }
    }

    /// Holds the keys against each other and against the tables they depend on.
    fn agree(self, engine: EngineChoice, listen: Listeners<'_>, problems: &mut Problems) {
        let shares = [("upgrade.canary", self.canary), ("upgrade.bake", self.bake)];
        let shares: Vec<_> = shares.into_iter().filter(|(_, place)| place.is_some()).collect();
        let steered = shares.iter().cloned().chain(Some(("upgrade.batch", self.batch.clone())));
        for (key, place) in steered.filter(|(_, place)| engine == EngineChoice::None && place.is_some()) {
            let help =
                "with it nothing decides who gets new connections: choose another engine, or leave this out";
            problems.add(key, place, "not possible with steering.engine = \"none\"", help);
        }
        if let Some(listen) = listen.in_order().find(|listen| listen.bind() == Bind::Master) {
            for (key, place) in shares.iter().cloned() {
                let message = format!("not possible with bind = \"master\" (listen {:?})", listen.name());
                let help = "old and new workers share the seat's socket, so new connections can't be parted between \
                            them: use bind = \"worker\", or leave this out";
                problems.add(key, place, message, help);
            }
        }
        if let Some((other, _)) = shares.first()
            && self.batch.is_some()
        {
            let help = "the old workers of earlier batches are gone, so there is nothing to steer back to: use one or \
                        the other";
            problems.add("upgrade.batch", self.batch, format!("a number is not possible with {other}"), help);
        }
        if shares.is_empty() && self.check.is_some() {
            let help =
                "it runs during canary and bake only: set upgrade.canary or upgrade.bake, or leave this out";
            problems.add("upgrade.check", self.check, "would never run", help);
        }
    }
}
