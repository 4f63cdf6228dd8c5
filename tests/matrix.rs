//! The guarantee matrix: every cell is a run. Written to `target/guarantee-matrix.md`; the README shows the same.

use std::fmt::Write;
use std::fs;

use crate::adoption::lost_with_the_master;
use crate::crash::{kill_the_fullest, one_at_a_time, only_worker_killed, queues_of_twenty};
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::world::{Need, World, repository, sysctl, world};

/// One kind of worker with one engine, and its promises.
struct Row {
    name: &'static str,
    mode: &'static str,
    engine: &'static str,
    /// The queue of a worker that is killed is lost with it.
    loses_queue: bool,
}

const ROWS: [Row; 6] = [
    Row { name: "handover (SDK), `ebpf`", mode: "sdk", engine: "ebpf", loses_queue: false },
    Row { name: "handover (SDK), `cbpf`", mode: "sdk", engine: "cbpf", loses_queue: false },
    Row { name: "unmodified, `ebpf`", mode: "plain", engine: "ebpf", loses_queue: false },
    Row { name: "unmodified, `cbpf`", mode: "plain", engine: "cbpf", loses_queue: true },
    Row { name: "`bind = \"master\"`, `ebpf`", mode: "activated", engine: "ebpf", loses_queue: false },
    Row { name: "`bind = \"master\"`, `cbpf`", mode: "activated", engine: "cbpf", loses_queue: false },
];

/// Upgrades by turns with launches that fail; the connections lost.
fn upgrades_and_failed_launches(world: &World, row: &Row) -> u64 {
    let mut app =
        App::test_worker(world, &format!("--mode {} --accept-delay 5", row.mode)).engine(row.engine);
    let master = Master::start(world, &app);
    let load = Load::start(slow_accepts(world));
    let good = app.command.clone();
    for _ in 0..2 {
        // One that was given its socket can't fail after listening.
        let fails = if row.mode == "activated" {
            "activated --fail exit-before-ready"
        } else {
            "plain --fail exit-after-listen"
        };
        app.command = test_worker(&format!("--mode {fails}"));
        app.write();
        assert_eq!(master.failing_upgrade().0, 1);
        app.command.clone_from(&good);
        app.write();
        master.hup();
        load.answered(50);
    }
    let report = load.end();
    master.stop();
    report.lost()
}

/// Kills with siblings alive: connections lost, and how many of them the master has counted.
fn siblings_alive(world: &World, row: &Row, kills: u32) -> (u64, u64) {
    let master = Master::start(world, &one_at_a_time(world, row.mode, row.engine));
    let load = Load::start(queues_of_twenty(world));
    kill_the_fullest(&master, &load, kills);
    let report = load.end();
    let counted = master.counted_losses();
    master.stop();
    (report.lost(), counted)
}

/// What was lost of `kills` workers' connections, in the words of the table.
fn cell_of_kills(lost: u64, kills: u32) -> &'static str {
    if lost <= u64::from(kills) { "0 beyond what it held" } else { "its queue, counted" }
}

fn cells(world: &World, row: &Row) -> [String; 4] {
    const KILLS: u32 = 3;
    let (lost, counted) = siblings_alive(world, row, KILLS);
    let mut siblings = cell_of_kills(lost, KILLS).to_owned();
    let told = format!("{}: {lost} lost, {counted} of them counted, {KILLS} kills", row.name);
    assert_eq!(counted > 0, row.loses_queue, "{told}");
    assert!((counted..=counted + u64::from(KILLS)).contains(&lost), "{told}");
    if row.loses_queue {
        sysctl("net.ipv4.tcp_migrate_req", "1");
        let (lost, _) = siblings_alive(world, row, KILLS);
        sysctl("net.ipv4.tcp_migrate_req", "0");
        assert!(lost <= u64::from(KILLS), "{}: {lost} lost in spite of tcp_migrate_req", row.name);
        siblings.push_str("; 0 with tcp_migrate_req=1");
    }
    let (lost, counted) = only_worker_killed(world, row.mode, row.engine);
    assert!((counted..=counted + 2).contains(&lost), "{}: {lost} lost, {counted} of them counted", row.name);
    let alone = if counted == 0 { "0, clients wait" } else { "clients wait, its queue counted" }.to_owned();
    let upgrades = upgrades_and_failed_launches(world, row).to_string();
    [upgrades, siblings, alone, lost_with_the_master(world, row.mode, row.engine).to_string()]
}

#[test]
fn every_cell_holds() {
    world(&[Need::Root, Need::Bpf], |world| {
        let mut table = String::from(
            "| lost connections | upgrade, failed launch | worker SIGKILL, siblings alive | last worker SIGKILLed | \
             master SIGKILL |\n|---|---|---|---|---|\n",
        );
        for row in &ROWS {
            writeln!(table, "| {} | {} |", row.name, cells(world, row).join(" | ")).unwrap();
        }
        fs::create_dir_all(repository("target")).unwrap();
        fs::write(repository("target/guarantee-matrix.md"), &table).unwrap();
        for row in &ROWS {
            let line = table.lines().find(|line| line.contains(row.name)).unwrap();
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            assert_eq!((cells[2], cells[5]), ("0", "0"), "{table}");
            assert!(row.loses_queue || cells[4] == "0, clients wait", "{table}");
        }
        compare_with_readme(&table);
    });
}

/// Between two marks the README shows this very table.
fn compare_with_readme(table: &str) {
    let readme = fs::read_to_string(repository("README.md")).unwrap_or_default();
    if let Some((_, rest)) = readme.split_once("<!-- matrix -->\n") {
        let (shown, _) = rest.split_once("<!-- /matrix -->").expect("the table ends with <!-- /matrix -->");
        assert_eq!(shown.trim(), table.trim(), "the README's matrix is not what the runs say");
    }
}
