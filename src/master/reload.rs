//! An upgrade is asked for: the config is read again and the program pinned before the core hears of it.

use std::rc::Rc;

use reuseportd_core::{
    Before, Breaker, CanaryStep, Engine, Event, Generation, Notice, Plan, Policy, Readiness, StopWhen,
    Ticket, Trigger, Wait,
};
use reuseportd_wire::status as wire;

use super::launch::{Launch, UNKNOWN_CONFIG};
use super::process::printable;
use super::{Shell, clock, words};
use crate::config::{self, Config, Endpoint, ReadinessMethod};

/// An upgrade that does not even begin.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) text: String,
    /// Exit code of the client: 2 for an invalid config, else 1.
    pub(super) code: u8,
}

impl Shell {
    /// Reads the config again and asks the core for an upgrade. Refused, nothing has changed.
    pub(super) fn trigger(&mut self, trigger: Trigger, by: Option<(Ticket, Wait)>) -> Result<(), Refusal> {
        match self.prepare() {
            Ok((launch, plan)) => {
                self.prepared.push_back(launch);
                self.inbox.push_back(Event::Upgrade { plan, trigger, by });
                Ok(())
            }
            Err((summary, refusal)) => {
                self.refused(trigger, &summary);
                Err(refusal)
            }
        }
    }

    fn prepare(&mut self) -> Result<(Launch, Plan), (String, Refusal)> {
        let config = config::load(&self.config_path).map_err(|errors| {
            (format!("invalid config: {}", errors.summary()), Refusal { text: errors.to_string(), code: 2 })
        })?;
        let refuse = |text: String| (text.clone(), Refusal { text, code: 1 });
        self.check_change(&config).map_err(refuse)?;
        let mut launch = Launch::prepare(Rc::new(config), &self.runtime, &mut self.groups, &mut self.shared)
            .map_err(|error| refuse(error.to_string()))?;
        launch.config_number = self.number_of(&launch.config);
        let plan = plan(&launch, self.groups.choice.engine);
        Ok((launch, plan))
    }

    /// Equal configs have the same number.
    fn number_of(&mut self, config: &Config) -> u64 {
        // From which config workers without a master were started is only assumed.
        let is_known = |launch: &&Launch| launch.config_number != UNKNOWN_CONFIG && *launch.config == *config;
        let known = self.launches.values().chain(&self.prepared).find(is_known);
        match known {
            Some(launch) => launch.config_number,
            None => {
                self.config_last += 1;
                self.config_last
            }
        }
    }

    /// `rollback`: takes the present upgrade back, or asks the core for one to the generation before.
    pub(super) fn roll_back(&mut self, by: Ticket, wait: Option<Wait>) -> Result<(), Refusal> {
        let refused = |text: String| Refusal { text, code: 1 };
        let before = match self.core.before() {
            Before::Present => {
                self.inbox.push_back(Event::TakeBack { by: wait.map(|_| by) });
                return Ok(());
            }
            Before::Past(generation) => generation,
            Before::Nothing => {
                let text = "there is no generation before the present one that could be brought back";
                self.refused(Trigger::Rollback, text);
                return Err(refused(text.to_owned()));
            }
        };
        match self.prepare_again(before) {
            Ok((launch, plan)) => {
                self.prepared.push_back(launch);
                let by = wait.map(|wait| (by, wait));
                self.inbox.push_back(Event::Upgrade { plan, trigger: Trigger::Rollback, by });
                Ok(())
            }
            Err(text) => {
                self.refused(Trigger::Rollback, &text);
                Err(refused(text))
            }
        }
    }

    fn prepare_again(&mut self, generation: Generation) -> Result<(Launch, Plan), String> {
        let failed = |error: &dyn std::fmt::Display| {
            format!("generation {} can't be brought back: {error}", generation.0)
        };
        let launch = self.launches.get(&generation).ok_or("nothing is known of it any more");
        let config = launch.map_err(|error| failed(&error))?.config.clone();
        self.check_change(&config).map_err(|error| failed(&error))?;
        let launch = self
            .launches
            .get(&generation)
            .map(|launch| launch.again(&self.runtime, &mut self.groups, &mut self.shared));
        let launch = launch.ok_or_else(String::new)?.map_err(|error| failed(&error))?;
        if launch.executable.is_script() {
            let path = launch.executable.path();
            tracing::warn!(
                event = "not_pinned",
                generation = generation.0,
                "{} is a script: what it loads is what is there now",
                path.display()
            );
        }
        let plan = plan(&launch, self.groups.choice.engine);
        Ok((launch, plan))
    }

    /// What can't change while the master runs.
    fn check_change(&self, new: &Config) -> Result<(), String> {
        let restart = "restart the service to change it";
        if new.app.name != self.config.app.name {
            return Err(format!("app.name can't change in an upgrade: {restart}"));
        }
        if new.control.socket != self.config.control.socket {
            return Err(format!("control.socket can't change in an upgrade: {restart}"));
        }
        if new.steering.engine != self.config.steering.engine {
            return Err(format!("steering.engine can't change in an upgrade: {restart}"));
        }
        let (old_uid, new_uid) = (self.config.app.uid().as_raw(), new.app.uid().as_raw());
        if new_uid != old_uid {
            return Err(format!(
                "app.user can't change in an upgrade (uid {old_uid} to {new_uid}): the kernel lets only sockets of one \
                 uid share an address, so the new workers could not bind beside those that serve; {restart}"
            ));
        }
        self.check_privileges(&new.app)?;
        self.check_overlap(new)
    }

    /// A new address that shares traffic with one in use takes it at once, before any of its workers is ready.
    fn check_overlap(&self, new: &Config) -> Result<(), String> {
        for listen in &new.listen {
            let in_use = self.groups.iter().map(|(_, group)| group.endpoint());
            let others: Vec<_> = in_use.filter(|place| *place != listen.endpoint()).collect();
            let is_at =
                |place: &Endpoint| (place.protocol, place.address) == (listen.protocol, listen.address);
            if others.iter().any(is_at) {
                return Err(format!(
                    "listen {:?}: v6only of {} can't change in an upgrade: the kernel does not steer between sockets \
                     with and without it; restart the service to change it",
                    listen.name, listen.address
                ));
            }
            let clash = |other: &Endpoint| Some((other.address, config::clash(*other, listen.endpoint())?));
            if let Some((other, why)) = others.iter().find_map(clash) {
                return Err(format!(
                    "listen {:?}: {} can't be added while {other} is served: the kernel would give it connections \
                     before its workers are ready ({why}); restart the service to change it",
                    listen.name, listen.address
                ));
            }
        }
        Ok(())
    }

    fn refused(&mut self, trigger: Trigger, reason: &str) {
        // Names of the config and of files are in it.
        let reason = printable(reason);
        tracing::error!(event = "upgrade_refused", reason = %reason, "upgrade refused: {reason}; nothing changed");
        let from = self.core.status().active.map(|generation| generation.0);
        let receipt = wire::Receipt {
            from,
            to: None,
            trigger: words::trigger(trigger),
            outcome: wire::Outcome::Refused,
            reason: Some(reason.clone()),
            started_at: clock::wall(clock::now()),
            duration_ms: 0,
            phases: Vec::new(),
            listeners: Vec::new(),
            forced_kills: 0,
            connections_cut: Some(0),
            superseded_by: None,
            steer_back_us: None,
            checks_passed: 0,
        };
        self.keep(None, receipt);
        self.upstream.status(&format!("upgrade refused: {reason}"));
        // There is no message for a failed reload: systemd is told that it began and ended, and why it came to nothing.
        if trigger == Trigger::Signal && !self.core.has_upgrade() {
            self.upstream.notice(Notice::Reloading);
            self.upstream.notice(Notice::Ready);
        }
    }
}

/// What the core has to know of a config.
pub(super) fn plan(launch: &Launch, engine: Engine) -> Plan {
    let config = &launch.config;
    let settle = match engine {
        Engine::Cbpf => std::time::Duration::from_secs(10),
        Engine::Ebpf | Engine::None => std::time::Duration::from_secs(2),
    };
    let (upgrade, restart) = (&config.upgrade, &config.restart);
    let of_kind = |is_it: fn(&config::Listen) -> bool| {
        launch.listeners().filter(|(_, listen)| is_it(listen)).map(|(group, _)| group).collect()
    };
    Plan {
        config: launch.config_number,
        workers: config.app.workers,
        configured: config.app.workers,
        groups: launch.groups.clone(),
        seat_groups: launch.seat_listeners().map(|(group, _)| group).collect(),
        datagram_groups: of_kind(|listen| listen.protocol == wire::Protocol::Udp),
        flow_groups: launch
            .listeners()
            .filter_map(|(group, listen)| Some((group, listen.flows?.timeout)))
            .collect(),
        policy: match config.steering.policy {
            config::Policy::Hash => Policy::Hash,
            config::Policy::Cpu => Policy::Cpu,
        },
        readiness: match config.readiness.method {
            ReadinessMethod::Notify => Readiness::Notify,
            ReadinessMethod::Listen => Readiness::Listen,
            ReadinessMethod::Http => Readiness::Http,
        },
        passes: config.readiness.passes,
        interval: config.readiness.interval,
        ready_timeout: upgrade.ready_timeout,
        settle_timeout: upgrade.settle_timeout.unwrap_or(settle.min(upgrade.drain_timeout)),
        stop_when: match upgrade.stop_when {
            config::StopWhen::Drained => StopWhen::Drained,
            config::StopWhen::Idle => StopWhen::Idle,
            config::StopWhen::Auto => StopWhen::Auto,
        },
        idle_timeout: upgrade.idle_timeout,
        drain_timeout: upgrade.drain_timeout,
        max_draining: upgrade.max_draining,
        batch: upgrade.batch,
        canary: upgrade.canary.iter().map(|step| CanaryStep { share: step.share, hold: step.hold }).collect(),
        bake: upgrade.bake,
        check_interval: Some(upgrade.check_interval).filter(|_| !upgrade.check.is_empty()),
        watchdog: config.watchdog,
        backoff: restart.backoff,
        backoff_max: restart.backoff_max,
        stable_after: restart.stable_after,
        breaker: Breaker {
            exits: restart.breaker.exits,
            window: restart.breaker.window,
            cooldown: restart.breaker.cooldown,
        },
    }
}
