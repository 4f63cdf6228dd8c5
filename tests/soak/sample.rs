//! What there is of everything that could pile up.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reuseportd_sys::bpf::{Kind, ids};

use crate::support::master::Master;
use crate::support::process::{keepers_of, processes_of, state_of};

/// In a thousand upgrades a leak of 130 bytes each is more.
const KEPT_KIB: u64 = 128;

/// Looks at what all others are compared with.
const LOOKS: u32 = 10;
/// What is only there for a moment is gone by then.
const LONG: Duration = Duration::from_secs(5);

/// How much more than at the first time there may be of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Growth {
    None,
    /// One in a hundred.
    Percent,
    /// What the allocator keeps of what was needed for a moment, in KiB: it depends on what happens at the same time.
    Kept,
    /// It is only told: others on this machine have some too.
    Any,
}

/// What is counted, and how much it may grow.
pub(super) const COLUMNS: [(&str, Growth); 14] = [
    ("fds master", Growth::None),
    ("fds keeper", Growth::None),
    ("fds workers", Growth::None),
    ("threads", Growth::None),
    ("KiB master", Growth::Kept),
    ("KiB keeper", Growth::Kept),
    ("BPF held", Growth::None),
    ("BPF unheld", Growth::Any),
    ("cgroups", Growth::None),
    ("files", Growth::None),
    ("processes", Growth::None),
    ("sockets", Growth::None),
    ("state bytes", Growth::Percent),
    ("journal bytes", Growth::Percent),
];

/// All of it at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sample(pub(super) [u64; COLUMNS.len()]);

/// A BPF object by its number.
type Object = (Kind, u32);

/// The machine's BPF objects before the service was started: none of them is its own.
pub(super) struct Bpf(BTreeSet<Object>);

impl Sample {
    /// The least of each that is seen, until it is not more than at the first time, or for a while. For a moment there are
    /// clients, a keeper that has not heard the latest, and processes that have ended and are not reaped.
    pub(super) fn settled(master: &Master, bpf: &Bpf, first: Option<&Sample>) -> Sample {
        let (begun, mut least) = (Instant::now(), Sample::take(master, bpf));
        for looks in 1.. {
            let is_flat = first.map_or(looks == LOOKS, |first| least.grown(first).is_empty());
            if is_flat || begun.elapsed() > LONG {
                break;
            }
            // A round trip to the master, which paces the loop.
            master.status();
            let now = Sample::take(master, bpf);
            least.0.iter_mut().zip(now.0).for_each(|(least, now)| *least = now.min(*least));
        }
        least
    }

    /// What there is more of than is allowed, since that sample.
    pub(super) fn grown(&self, since: &Sample) -> Vec<String> {
        let all = COLUMNS.iter().zip(since.0).zip(self.0);
        let grown = all.filter(|((column, was), is)| match column.1 {
            Growth::None => is > was,
            Growth::Percent => is * 100 > was * 101,
            Growth::Kept => *is > was + KEPT_KIB,
            Growth::Any => false,
        });
        grown.map(|((column, was), is)| format!("{}: {was} to {is}", column.0)).collect()
    }

    fn take(master: &Master, bpf: &Bpf) -> Sample {
        let (app, keepers) = (master.app(), keepers_of(master.app()));
        let workers: Vec<u32> = processes_of(app).iter().map(|process| process.pid).collect();
        let fds = |pids: &[u32]| pids.iter().map(|pid| entries(&format!("/proc/{pid}/fd"))).sum();
        let of = |pids: &[u32], key: &str| pids.iter().map(|pid| in_status(*pid, key)).sum();
        let own = [&[master.pid()][..], &keepers].concat();
        let all = [&own[..], &workers].concat();
        let held = held_by(all.iter().map(u32::to_string));
        let run = master.runtime();
        let journal = fs::read_to_string(run.join("control.sock.journal")).unwrap_or_default();
        Sample([
            fds(&[master.pid()]),
            fds(&keepers),
            fds(&workers),
            of(&own, "Threads:"),
            of(&[master.pid()], "RssAnon:"),
            of(&keepers, "RssAnon:"),
            held.len() as u64,
            bpf.unheld().len() as u64,
            cgroup_of(master).map_or(0, |path| directories(&path)),
            entries(run.to_str().unwrap()),
            workers.len() as u64 + children(&own),
            sockets(),
            without_digits(&state_of(app)),
            without_digits(&journal),
        ])
    }
}

/// A number of more digits is no growth.
fn without_digits(text: &str) -> u64 {
    text.chars().filter(|c| !c.is_ascii_digit()).count() as u64
}

fn entries(directory: &str) -> u64 {
    fs::read_dir(directory).into_iter().flatten().count() as u64
}

/// This directory and all below.
fn directories(path: &Path) -> u64 {
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    1 + below.filter(|path| path.is_dir()).map(|path| directories(&path)).sum::<u64>()
}

/// A number of `/proc/PID/status`; 0 of a process that has ended.
fn in_status(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let number =
        text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}

/// Children of these, the dead ones that nobody has reaped included.
fn children(pids: &[u32]) -> u64 {
    let children = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let texts = pids.iter().filter_map(|pid| children(pid).ok());
    texts.map(|text| text.split_whitespace().count() as u64).sum()
}

/// When the service has stopped nothing is left that could keep a BPF object: its processes are gone.
pub(super) fn nothing_is_left(cgroup: Option<&Path>) {
    assert_eq!(sockets(), 0, "sockets are left behind");
    assert!(cgroup.is_none_or(|path| !path.exists()), "{cgroup:?} is left behind");
}

/// Where the app's cgroup is, if it has one.
pub(super) fn cgroup_of(master: &Master) -> Option<PathBuf> {
    fs::read_link(master.runtime().join("control.sock.cgroup")).ok()
}

/// What listens, or receives, in this thread's network namespace.
fn sockets() -> u64 {
    let table = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
    let listens = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
    // Connected ones are clients'.
    let receives = |line: &&str| line.split_whitespace().nth(2) == Some("00000000:0000");
    let has_path = |line: &&str| line.contains(" 00010000 ");
    let (tcp, udp, unix) = (table("tcp"), table("udp"), table("unix"));
    let all = [
        tcp.lines().filter(listens).count(),
        udp.lines().filter(receives).count(),
        unix.lines().filter(has_path).count(),
    ];
    all.iter().sum::<usize>() as u64
}

/// The BPF objects that these processes have descriptors of.
fn held_by(pids: impl Iterator<Item = String>) -> BTreeSet<Object> {
    let mut held = BTreeSet::new();
    for entry in pids.flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten()) {
        // Of a descriptor that is closed by now there is nothing to be said.
        let text = entry.and_then(|entry| fs::read_to_string(entry.path())).unwrap_or_default();
        let keys = [("prog_id:", Kind::Program), ("map_id:", Kind::Map), ("link_id:", Kind::Link)];
        held.extend(text.lines().find_map(|line| {
            let (key, id) = line.split_once('\t')?;
            let (_, kind) = keys.iter().find(|(name, _)| *name == key)?;
            Some((*kind, id.trim().parse().ok()?))
        }));
    }
    held
}

/// All BPF objects of this machine.
fn all() -> BTreeSet<Object> {
    let kinds = [Kind::Program, Kind::Map, Kind::Link];
    kinds.into_iter().flat_map(|kind| ids(kind).unwrap().into_iter().map(move |id| (kind, id))).collect()
}

impl Bpf {
    pub(super) fn before() -> Bpf {
        Bpf(all())
    }

    /// Those made since then that no process has a descriptor of: sockets, cgroups or the file system keep them.
    fn unheld(&self) -> BTreeSet<Object> {
        let all = all();
        let pids =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let held = held_by(pids.filter(|name| name.parse::<u32>().is_ok()));
        all.into_iter().filter(|object| !self.0.contains(object) && !held.contains(object)).collect()
    }
}
