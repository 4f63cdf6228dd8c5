//! The answer to `status`: the core's picture with what only the shell knows.

use reuseportd_core::{
    Generation, GenerationState, GenerationView, ListenerView, MasterState, Time, WorkerId, WorkerState,
    WorkerView,
};
use reuseportd_wire::status as wire;
use sha2::{Digest, Sha256};

use super::groups::engine_word;
use super::{Shell, clock};
use crate::config::Bind;

/// A larger executable is not hashed: reading it would hold the master up.
const HASHED_BYTES_MAX: u64 = 256 << 20;

impl Shell {
    /// The whole status.
    pub(super) fn status(&mut self) -> wire::Status {
        // The latest queues, not those of the last upgrade.
        let groups: Vec<_> = self.groups.iter().map(|(id, _)| id).collect();
        let depths: Vec<_> =
            groups.iter().filter_map(|id| self.observe(*id).ok()).flat_map(|view| view.depths).collect();
        let view = self.core.status();
        let connections = self.connections(&view.generations);
        let generations = view.generations.iter().map(|generation| {
            let count = connections.as_ref().map(|count| {
                let of = |view: &WorkerView| {
                    view.worker.and_then(|worker| count.iter().find(|(id, _)| *id == worker))
                };
                generation.workers.iter().filter_map(of).map(|(_, open)| u64::from(*open)).sum()
            });
            self.generation_status(generation, count, &depths)
        });
        wire::Status {
            app: self.config.app.name.clone(),
            state: master_state(view.state),
            state_reason: self.state_reason.clone(),
            master: wire::MasterInfo {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                started_at: clock::wall(self.started),
                reexecs: self.reexecs,
                adopted: self.adopted,
                keeper: self.keeper.as_ref().map(|keeper| keeper.pid().cast_unsigned()),
            },
            active_generation: view.active.map(|generation| generation.0),
            generations: generations.collect(),
            listeners: self.listener_status(),
            scaled: view.scaled.map(|(workers, configured)| wire::Scaled {
                workers: workers.into(),
                configured: configured.into(),
            }),
            upgrade_waits: view.upgrade_waits,
            hold_ms: view.hold_until.map(millis_until),
            last_upgrade: self.receipts.back().map(|(_, receipt)| receipt.clone()),
        }
    }

    fn connections(&self, generations: &[GenerationView]) -> Option<Vec<(WorkerId, u32)>> {
        let workers: Vec<WorkerId> = generations
            .iter()
            .flat_map(|generation| &generation.workers)
            .filter_map(|view| view.worker)
            .collect();
        self.count(&workers).ok()
    }

    fn generation_status(
        &self,
        view: &GenerationView,
        connections: Option<u64>,
        depths: &[(reuseportd_core::ListenerId, reuseportd_core::Depth)],
    ) -> wire::GenerationStatus {
        wire::GenerationStatus {
            generation: view.generation.0,
            state: match view.state {
                GenerationState::Launching => wire::GenerationState::Launching,
                GenerationState::Canary => wire::GenerationState::Canary,
                GenerationState::Standby => wire::GenerationState::Standby,
                GenerationState::Active => wire::GenerationState::Active,
                GenerationState::Retiring => wire::GenerationState::Retiring,
                GenerationState::Draining => wire::GenerationState::Draining,
            },
            share: f64::from(view.share) / 1000.0,
            executable: self.executable(view.generation),
            connections,
            deadline_ms: view
                .deadline
                .map(|deadline| u64::try_from(deadline.since(clock::now()).as_millis()).unwrap_or(u64::MAX)),
            workers: view
                .workers
                .iter()
                .map(|worker| self.worker_status(view.state, worker, depths))
                .collect(),
        }
    }

    fn executable(&self, generation: Generation) -> wire::ExecutableInfo {
        let launch = self.launches.get(&generation);
        let path = launch.map(|launch| launch.executable.path().display().to_string());
        wire::ExecutableInfo {
            path: path.unwrap_or_default(),
            inode: launch.map_or(0, |launch| launch.executable.identity().inode),
            sha256: launch.and_then(|launch| launch.sha256()),
            pinned: launch.is_some_and(|launch| !launch.executable.is_script()),
        }
    }

    fn worker_status(
        &self,
        of: GenerationState,
        view: &WorkerView,
        depths: &[(reuseportd_core::ListenerId, reuseportd_core::Depth)],
    ) -> wire::WorkerStatus {
        let process = view.worker.and_then(|worker| self.processes.get(&worker));
        let listener = |listener: &ListenerView| {
            let depth = depths.iter().find(|(id, _)| *id == listener.listener).map(|(_, depth)| depth);
            let group = self.groups.of(listener.group);
            let is_udp = group.is_some_and(|group| group.protocol == wire::Protocol::Udp);
            wire::WorkerListener {
                name: self.groups.name(listener.group).to_owned(),
                accept_queue: depth.filter(|_| !is_udp).map(|depth| depth.queued),
                backlog: depth.filter(|_| !is_udp).map(|depth| depth.backlog),
                receive_queue: depth.filter(|_| is_udp).map(|depth| depth.queued),
                drops: depth.and_then(|depth| depth.drops),
            }
        };
        wire::WorkerStatus {
            seat: u32::from(view.seat.0),
            pid: process.and_then(|process| u32::try_from(process.pid).ok()),
            state: match worker_state(view.state) {
                // It has flows left, which are its open connections.
                wire::WorkerState::Retiring if of == GenerationState::Draining => wire::WorkerState::Draining,
                state => state,
            },
            restarts: view.restarts,
            started_at: process.map(|process| clock::wall(process.started)),
            status: process.and_then(|process| process.status.clone()),
            listeners: view.listeners.iter().map(listener).collect(),
        }
    }

    fn listener_status(&self) -> Vec<wire::ListenerStatus> {
        let choice = &self.groups.choice;
        let engine = engine_word(choice.engine);
        self.groups
            .iter()
            .map(|(id, group)| wire::ListenerStatus {
                name: group.name.clone(),
                address: group.address.to_string(),
                protocol: group.protocol,
                bind: match group.bind {
                    Bind::Worker => wire::Bind::Worker,
                    Bind::Master => wire::Bind::Master,
                },
                engine,
                engine_reason: choice.reason.clone(),
                strangers: self.strangers(id).ok(),
                leftovers_taken: group.leftovers_taken,
                leftovers_lost: group.leftovers_lost,
                flows_begun: self.groups.flow_counters(id).map(|flows| flows.begun),
                flows_forgotten: self.groups.flow_counters(id).map(|flows| flows.overflow),
            })
            .chain(self.shared_status())
            .collect()
    }
}

impl super::launch::Launch {
    /// The executable's checksum, worked out once.
    fn sha256(&self) -> Option<String> {
        self.sha256.get_or_init(|| self.hash()).clone()
    }

    fn hash(&self) -> Option<String> {
        if self.executable.identity().size > HASHED_BYTES_MAX {
            return None;
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut hashed = 0;
        loop {
            let count = rustix::io::pread(self.executable.fd(), &mut buffer, hashed).ok()?;
            if count == 0 {
                break;
            }
            hash.update(buffer.get(..count)?);
            hashed += count as u64;
        }
        Some(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

fn millis_until(time: Time) -> u64 {
    u64::try_from(time.since(clock::now()).as_millis()).unwrap_or(u64::MAX)
}

fn master_state(state: MasterState) -> wire::MasterState {
    match state {
        MasterState::Starting => wire::MasterState::Starting,
        MasterState::Steady => wire::MasterState::Steady,
        MasterState::Launching => wire::MasterState::Launching,
        MasterState::Canary => wire::MasterState::Canary,
        MasterState::Baking => wire::MasterState::Baking,
        MasterState::Retiring => wire::MasterState::Retiring,
        MasterState::RollingBack => wire::MasterState::RollingBack,
        MasterState::Stopping => wire::MasterState::Stopping,
        MasterState::Degraded => wire::MasterState::Degraded,
    }
}

fn worker_state(state: Option<WorkerState>) -> wire::WorkerState {
    match state {
        None => wire::WorkerState::Backoff,
        Some(WorkerState::Spawning | WorkerState::Starting { .. } | WorkerState::Proving) => {
            wire::WorkerState::Starting
        }
        Some(WorkerState::Ready | WorkerState::Joining { .. }) => wire::WorkerState::Ready,
        Some(WorkerState::Serving) => wire::WorkerState::Serving,
        Some(WorkerState::Emptying | WorkerState::Idling { .. } | WorkerState::Stopping { .. }) => {
            wire::WorkerState::Retiring
        }
        Some(WorkerState::Draining | WorkerState::Dying | WorkerState::Remains { .. }) => {
            wire::WorkerState::Draining
        }
    }
}
