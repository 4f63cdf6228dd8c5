//! Whole files through `load`.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;

use rustix::thread::CapabilitySet;

use super::*;

mod datagrams;
mod unix;

const SMALLEST: &str = r#"
[app]
name = "web"
command = ["/bin/web"]
[[listen]]
address = "127.0.0.1:8080"
"#;

const FULL: &str = r#"
[app]
name = "web-1"
command = ["/bin/web", "--at", "{address.http}", "{seat}/{generation}"]
workers = 3
working_directory = "/srv"
environment = { RUST_LOG = "info" }
environment_file = "/etc/web.env"
umask = "027"
limits = { nofile = 65536, core = 0, memlock = "unlimited" }
no_new_privileges = false
output = "inherit"
stop_signal = "QUIT"
[[listen]]
name = "http"
address = "[::1]:80"
backlog = 7
[[listen]]
name = "admin"
address = "127.0.0.1:81"
[steering]
engine = "cbpf"
[readiness]
method = "listen"
[upgrade]
ready_timeout = "1s"
settle_timeout = "3s"
stop_when = "idle"
idle_timeout = "4s"
drain_timeout = "5s"
max_draining = 6
canary = [{ share = "0.5%", hold = "1s" }, { share = "12.5%", hold = "2m" }, { share = "100%", hold = "1ms" }]
bake = "7s"
check = ["bin/check", "{port.http}", "{generation}", "{{seat}}"]
check_interval = "8s"
[restart]
backoff = "1s"
backoff_max = "2s"
stable_after = "3s"
breaker = { exits = 4, cooldown = "5s" }
[watchdog]
timeout = "6s"
[control]
socket = "/tmp/x.sock"
mode = "0660"
allow_users = ["root", 12]
[log]
format = "json"
level = "debug"
"#;

fn load_text(text: &str) -> Result<Config, ConfigErrors> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    load(file.path())
}

fn summary(text: &str) -> String {
    let summary = load_text(text).unwrap_err().summary();
    assert!(!summary.contains('\n'), "{summary:?}");
    summary
}

#[test]
fn the_smallest_config_has_the_defaults_of_the_contract() {
    let config = load_text(SMALLEST).unwrap();
    assert_eq!(config.app.command, ["/bin/web"]);
    assert!((1..=1024).contains(&config.app.workers));
    assert_eq!((config.app.no_new_privileges, config.app.output), (true, Output::Tag));
    assert_eq!((config.app.stop_signal, config.app.umask), (Signal::SIGTERM, None));
    let address = "127.0.0.1:8080".parse().unwrap();
    let listen = Listen {
        name: "default".into(),
        protocol: Protocol::Tcp,
        address,
        bind: Bind::Worker,
        v6only: false,
        backlog: 4096,
        force_reuseport: false,
        flows: None,
    };
    assert_eq!(config.listen, [listen]);
    assert_eq!(config.steering.engine, EngineChoice::Auto);
    assert_eq!(config.readiness.method, ReadinessMethod::Notify);
    let seconds = Duration::from_secs;
    let upgrade = Upgrade {
        batch: None,
        canary: Vec::new(),
        bake: Duration::ZERO,
        check: Vec::new(),
        check_interval: seconds(2),
        ready_timeout: seconds(60),
        settle_timeout: None,
        stop_when: StopWhen::Auto,
        idle_timeout: seconds(2),
        drain_timeout: seconds(60),
        max_draining: 4,
    };
    assert_eq!(config.upgrade, upgrade);
    assert!(config.expand_check(1).is_empty());
    let restart = Restart {
        backoff: Duration::from_millis(100),
        backoff_max: seconds(10),
        stable_after: seconds(10),
        breaker: Breaker { exits: 10, window: seconds(60), cooldown: seconds(60) },
    };
    assert_eq!((config.restart, config.watchdog), (restart, None));
    assert_eq!((config.control.mode, config.control.allow_users.as_slice()), (0o600, [].as_slice()));
    assert!(config.control.socket.ends_with("web/control.sock"), "{:?}", config.control.socket);
    assert_eq!(config.log, Log { format: LogFormat::Auto, level: tracing::Level::INFO });
}

#[test]
fn every_key_that_has_a_meaning_now_is_taken() {
    let config = load_text(FULL).unwrap();
    assert_eq!(config.expand_command(9, 2), ["/bin/web", "--at", "[::1]:80", "2/9"]);
    assert_eq!((config.app.workers, config.app.umask), (3, Some(0o27)));
    let limits =
        [(Resource::RLIMIT_CORE, 0), (Resource::RLIMIT_MEMLOCK, u64::MAX), (Resource::RLIMIT_NOFILE, 65536)];
    assert_eq!(config.app.limits, limits);
    assert_eq!((config.app.output, config.app.stop_signal), (Output::Inherit, Signal::SIGQUIT));
    assert_eq!((config.listen.len(), config.listen[0].backlog), (2, 7));
    assert_eq!(config.readiness.method, ReadinessMethod::Listen);
    assert_eq!(config.upgrade.settle_timeout, Some(Duration::from_secs(3)));
    let step = |share, ms| CanaryStep { share, hold: Duration::from_millis(ms) };
    assert_eq!(config.upgrade.canary, [step(5, 1000), step(125, 120_000), step(1000, 1)]);
    assert_eq!(config.upgrade.bake, Duration::from_secs(7));
    assert_eq!(config.expand_check(9), ["bin/check", "80", "9", "{seat}"]);
    assert_eq!(config.upgrade.check_interval, Duration::from_secs(8));
    assert_eq!(config.restart.breaker.exits, 4);
    assert_eq!(config.restart.breaker.window, Duration::from_secs(60));
    assert_eq!(config.watchdog, Some(Duration::from_secs(6)));
    let control = Control { socket: "/tmp/x.sock".into(), mode: 0o660, allow_users: vec![0, 12] };
    assert_eq!(config.control, control);
    assert_eq!(config.log, Log { format: LogFormat::Json, level: tracing::Level::DEBUG });
}

#[test]
fn a_config_survives_the_snapshot() {
    let survives = |config: Config| {
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config, "{text}");
        text
    };
    let examples =
        ["examples", "examples/servers"].map(|path| Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
    let files = examples.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let files = files.map(|file| file.unwrap().path());
    let configs = files.filter(|path| path.extension().is_some_and(|end| end == "toml"));
    let survivors: Vec<String> = configs.map(|path| survives(load(&path).unwrap())).collect();
    assert!(survivors.len() > 10, "{survivors:?}");
    let more = "[app]\nuser = \"root\"\ngroup = 61235\ncapabilities = [\"CAP_BPF\"]\ncpu_affinity = \"seat\"";
    let mut config = load_text(&FULL.replace("[app]", more)).unwrap();
    let text = survives(config.clone());
    for word in [r#""stop_signal":"SIGQUIT""#, r#"["memlock",18446744073709551615]"#, r#""level":"DEBUG""#] {
        assert!(text.contains(word), "{word}: {text}");
    }
    config.path = OsString::from_vec(vec![b'/', 0xff]).into();
    config.app.environment_file = Some(config.path.clone());
    survives(config);
    // What an older master does not know of is absent.
    let smallest = load_text(SMALLEST).unwrap();
    let mut older = survives(smallest.clone());
    for later in [
        r#""watchdog":null,"#,
        r#","force_reuseport":false"#,
        r#""batch":null,"#,
        r#""canary":[],"#,
        r#""bake":{"secs":0,"nanos":0},"#,
        r#""check":[],"#,
        r#""check_interval":{"secs":2,"nanos":0},"#,
    ] {
        assert!(older.contains(later), "{later}: {older}");
        older = older.replace(later, "");
    }
    assert_eq!(serde_json::from_str::<Config>(&older).unwrap(), smallest);
    let wrong = older.replace("SIGTERM", "SIGNONE");
    let said = serde_json::from_str::<Config>(&wrong).unwrap_err().to_string();
    assert!(said.starts_with("signal \"SIGNONE\" is not known to this version"), "{said}");
}

/// Keys of later versions: table, the key with its default ("" when it has none), the key asking for something.
const LATER: &[(&str, &str, &str)] = &[
    ("console", "", r#"listen = "127.0.0.1:9180""#),
    ("log", r#"format = "auto""#, r#"format = "journal""#),
];

#[test]
fn what_comes_later_is_refused_and_its_default_accepted() {
    for (table, default, other) in LATER {
        let with = |line: &str| match *table {
            "app" => SMALLEST.replace("[app]", &format!("[app]\n{line}")),
            _ => format!("{SMALLEST}[{table}]\n{line}\n"),
        };
        assert!(load_text(&with(default)).is_ok(), "{default}");
        let said = summary(&with(other));
        let key = other.split(' ').next().unwrap();
        assert!(
            said.contains(&format!("{key}: not supported yet")) && !said.contains("more"),
            "{other}: {said}"
        );
    }
}

#[test]
fn so_reuseport_is_forced_where_workers_bind_and_something_steers() {
    let with = |lines: &str| format!("{SMALLEST}force_reuseport = true\n{lines}\n");
    assert!(load_text(&with("")).unwrap().listen[0].force_reuseport);
    assert!(load_text(&with("[steering]\nengine = \"cbpf\"")).is_ok());
    for (lines, says) in [
        (
            "bind = \"master\"",
            "force_reuseport: is for sockets that workers bind, and with bind = \"master\" they don't",
        ),
        ("[steering]\nengine = \"none\"", "force_reuseport: needs an engine that steers"),
    ] {
        let said = summary(&with(lines));
        assert!(said.ends_with(&format!(":7:19: listen[0].{says}")), "{said}");
    }
}

/// The smallest config with lines for `[upgrade]`, the first of which is line 8.
fn with_upgrade(lines: &str) -> String {
    format!("{SMALLEST}[upgrade]\n{lines}\n")
}

const CANARY: &str = r#"canary = [{ share = "5%", hold = "30s" }]"#;
const BAKE: &str = r#"bake = "1s""#;

#[test]
fn upgrades_in_parts_are_taken() {
    for (lines, batch) in [
        ("", None),
        (r#"batch = "all""#, None),
        ("batch = 1", Some(1)),
        ("batch = 1024", Some(1024)),
        ("canary = []\nbatch = 2\nbake = \"0s\"", Some(2)),
        ("check = []\ncheck_interval = \"1ms\"", None),
    ] {
        assert_eq!(load_text(&with_upgrade(lines)).unwrap().upgrade.batch, batch, "{lines}");
    }
    for lines in [CANARY, BAKE] {
        let check = "check = [\"/bin/check\"]";
        assert!(load_text(&with_upgrade(&format!("{lines}\n{check}"))).is_ok(), "{lines}");
    }
}

#[test]
fn what_is_no_batch_or_check_is_refused() {
    for (lines, says) in [
        ("batch = 0", ":8:9: upgrade.batch: 0 is not possible"),
        ("batch = 1025", ":8:9: upgrade.batch: 1025 is not possible"),
        ("batch = \"1\"", ":8:9: upgrade.batch: \"1\" is not possible"),
        ("bake = \"-1s\"", ":8:8: upgrade.bake: \"-1s\" is negative"),
        ("check_interval = \"0s\"", ":8:18: upgrade.check_interval: \"0s\" is no time at all"),
        ("check = \"curl -f\"", ":8:9: upgrade.check: invalid type: string \"curl -f\", expected an array"),
    ] {
        let said = summary(&with_upgrade(lines));
        assert!(said.ends_with(says), "{lines}: {said}");
    }
}

#[test]
fn what_is_no_canary_is_refused() {
    for share in ["\"0%\"", "\"0.05%\"", "\"101%\"", "\"-1%\"", "\"5\"", "5", "0.05"] {
        let text = with_upgrade(&format!("canary = [{{ hold = \"1s\", share = {share} }}]"));
        let told = load_text(&text).unwrap_err();
        assert!(told.summary().contains(":8:34: upgrade.canary[0].share: "), "{share}: {}", told.summary());
        assert!(told.to_string().contains("from \"0.1%\" to \"100%\", in steps of 0.1%"), "{told}");
    }
    let steps =
        |first: &str, second: &str| with_upgrade(&format!("canary = [{{ {first} }},\n{{ {second} }}]"));
    let good = r#"share = "5%", hold = "1s""#;
    for (second, says) in [
        (good, ":9:11: upgrade.canary[1].share: \"5%\" is not more than in the step before"),
        (
            r#"share = "4.9%", hold = "1s""#,
            ":9:11: upgrade.canary[1].share: \"4.9%\" is not more than in the step before",
        ),
        (r#"share = "6%", hold = "0s""#, ":9:24: upgrade.canary[1].hold: \"0s\" is no time at all"),
        (r#"share = "6%""#, ":9:1: upgrade.canary[1].hold: missing"),
        (r#"hold = "1s""#, ":9:1: upgrade.canary[1].share: missing"),
        (r#"share = "6%", hodl = "1s""#, ":9:17: upgrade.canary[1].hodl: unknown key `hodl`"),
    ] {
        let said = summary(&steps(good, second));
        assert!(said.ends_with(says), "{second}: {said}");
    }
    assert!(load_text(&steps(good, r#"share = "5.1%", hold = "1s""#)).is_ok());
}

#[test]
fn the_words_of_a_check_are_those_of_a_command() {
    for (words, says) in [
        (r#" "" "#, ":9:11: upgrade.check[0]: empty"),
        (r#" "/bin/{generation}""#, ":9:11: upgrade.check[0]: a placeholder in the program's name"),
        (r#""a", "\u0000""#, ":9:15: upgrade.check[1]: contains a NUL character"),
        (r#""a", "{seat}""#, ":9:15: upgrade.check[1]: unknown placeholder {seat}"),
        (r#""a", "{port.http}""#, ":9:15: upgrade.check[1]: unknown placeholder {port.http}"),
    ] {
        let said = summary(&with_upgrade(&format!("{BAKE}\ncheck = [{words}]")));
        assert!(said.ends_with(says), "{words}: {said}");
    }
    let told = load_text(&with_upgrade(&format!("{BAKE}\ncheck = [\"a\", \"{{seat}}\"]"))).unwrap_err();
    let told = told.to_string();
    assert!(told.contains("for all seats together; known: {generation}, {address.default}"), "{told}");
}

#[test]
fn the_program_of_a_check_is_found_like_that_of_a_command() {
    let directory = tempfile::tempdir().unwrap();
    let config = |check: &str| {
        let text = with_upgrade(&format!("{BAKE}\ncheck = [\"{check}\"]"));
        let folder = format!("[app]\nworking_directory = {:?}", directory.path());
        load_text(&text.replace("[app]", &folder)).unwrap()
    };
    let found = |check: &str, path: &str| {
        let variables = BTreeMap::from([("PATH".to_owned(), path.to_owned())]);
        find_check(&config(check), &variables).map_err(|error| error.to_string())
    };
    let none = load_text(SMALLEST).unwrap();
    assert_eq!(find_check(&none, &BTreeMap::new()).unwrap(), None);
    let program = directory.path().join("well");
    std::fs::write(&program, "").unwrap();
    assert!(found("./well", "").unwrap_err().contains("not executable"));
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(found("./well", ""), Ok(Some(program.clone())));
    assert_eq!(found("well", directory.path().to_str().unwrap()), Ok(Some(program.clone())));
    assert_eq!(found(program.to_str().unwrap(), ""), Ok(Some(program)));
    assert!(found("well", "/nonexistent").unwrap_err().contains("in no directory of PATH (/nonexistent)"));
}

#[test]
fn upgrade_keys_that_exclude_each_other_are_refused() {
    let plain = with_upgrade("@");
    let batch = with_upgrade("batch = 2\n@");
    let master = plain.replace("[upgrade]", "bind = \"master\"\n[upgrade]");
    let none = plain.replace("[upgrade]", "[steering]\nengine = \"none\"\n[upgrade]");
    let check = "check = [\"/bin/check\"]";
    let seats = "old and new workers share the seat's socket";
    let either = "nothing to steer back to: use one or the other";
    let engine = "choose another engine, or leave this out";
    for (text, line, says, why) in [
        (
            &master,
            CANARY,
            ":9:10: upgrade.canary: not possible with bind = \"master\" (listen \"default\")",
            seats,
        ),
        (
            &master,
            BAKE,
            ":9:8: upgrade.bake: not possible with bind = \"master\" (listen \"default\")",
            seats,
        ),
        (&batch, CANARY, ":8:9: upgrade.batch: a number is not possible with upgrade.canary", either),
        (&batch, BAKE, ":8:9: upgrade.batch: a number is not possible with upgrade.bake", either),
        (&none, CANARY, ":10:10: upgrade.canary: not possible with steering.engine = \"none\"", engine),
        (&none, BAKE, ":10:8: upgrade.bake: not possible with steering.engine = \"none\"", engine),
        (&none, "batch = 2", ":10:9: upgrade.batch: not possible with steering.engine = \"none\"", engine),
        (&plain, check, ":8:9: upgrade.check: would never run", "set upgrade.canary or upgrade.bake"),
    ] {
        let told = load_text(&text.replace('@', line)).unwrap_err();
        assert!(told.summary().ends_with(says), "{line}: {}", told.summary());
        assert!(told.to_string().contains(why), "{why}: {told}");
    }
    // What stands for nothing excludes nothing, and a batch gets along with sockets of seats.
    for text in [&master, &none] {
        let idle = "batch = \"all\"\ncanary = []\nbake = \"0s\"\ncheck = []";
        assert!(load_text(&text.replace('@', idle)).is_ok(), "{text}");
    }
    assert!(load_text(&master.replace('@', "batch = 2")).is_ok());
    // A bake that can't be read is still one: the check is not told to need it.
    let said = summary(&plain.replace('@', &format!("bake = \"1x\"\n{check}")));
    assert!(said.ends_with(":8:8: upgrade.bake: \"1x\" is not a duration"), "{said}");
}

/// The smallest config with lines for `[app]`.
fn with_app(lines: &str) -> String {
    SMALLEST.replace("[app]", &format!("[app]\n{lines}"))
}

#[test]
fn an_identity_is_looked_up() {
    let app = load_text(&with_app("")).unwrap().app;
    assert_eq!((app.identity.is_another(), app.login.len(), app.cpu_by_seat), (false, 0, false));
    let app =
        load_text(&with_app("user = \"root\"\ncapabilities = [\"cap_kill\", \"CAP_BPF\"]")).unwrap().app;
    assert_eq!(app.uid().as_raw(), 0);
    assert_eq!(app.identity.groups.unwrap().gid.as_raw(), 0);
    assert_eq!(app.identity.capabilities, CapabilitySet::KILL | CapabilitySet::BPF);
    assert!(app.login.contains(&("USER".to_owned(), Some("root".to_owned()))), "{:?}", app.login);
    // By number, in either notation, and without an account.
    for user in ["61234", "\"61234\""] {
        let app = load_text(&with_app(&format!("user = {user}\ngroup = 61235\ncpu_affinity = \"seat\"")))
            .unwrap()
            .app;
        let groups = app.identity.groups.clone().unwrap();
        assert_eq!((app.uid().as_raw(), groups.gid.as_raw()), (61_234, 61_235));
        assert_eq!(groups.supplementary, [groups.gid]);
        assert!(app.cpu_by_seat && app.login.iter().all(|(_, value)| value.is_none()));
    }
    // A group alone leaves the user as it is.
    let app = load_text(&with_app("group = \"61235\"")).unwrap().app;
    assert_eq!((app.identity.uid, app.identity.groups.unwrap().gid.as_raw()), (None, 61_235));
}

#[test]
fn an_identity_that_there_is_not_is_refused() {
    for (line, says) in [
        ("user = \"no-such-user\"", ":3:8: app.user: there is no user \"no-such-user\""),
        ("group = \"no-such-group\"", ":3:9: app.group: there is no group \"no-such-group\""),
        ("user = 61234", ":3:8: app.user: uid 61234 has no account on this machine, so its group is unknown"),
        // To the kernel this number means: stay who you are.
        ("user = 4294967295", ":3:8: app.user: there is no user 4294967295"),
        ("group = \"4294967295\"", ":3:9: app.group: there is no group \"4294967295\""),
        ("user = -1", ":3:8: app.user: there is no user -1"),
        ("user = \"\"", ":3:8: app.user: there is no user \"\""),
        (
            "capabilities = [\"CAP_NET_BIND\"]",
            ":3:17: app.capabilities[0]: \"CAP_NET_BIND\" is no capability",
        ),
        ("capabilities = [\"\"]", ":3:17: app.capabilities[0]: \"\" is no capability"),
        ("cpu_affinity = \"cpu\"", ":3:16: app.cpu_affinity: \"cpu\" is not known"),
    ] {
        let said = summary(&with_app(line));
        assert!(said.ends_with(says), "{line}: {said}");
    }
    let told = load_text(&with_app("capabilities = [\"CAP_NET_BIND_SERVCE\"]")).unwrap_err().to_string();
    assert!(told.contains("did you mean `CAP_NET_BIND_SERVICE`"), "{told}");
}

#[test]
fn the_summary_is_one_line_with_the_place_and_the_count() {
    let said =
        summary("[app]\nname=\"a\"\ncommand = []\nworkers = 0\n[[listen]]\naddress = \"127.0.0.1:80\"\n");
    assert!(said.ends_with(":3:11: app.command: empty (and 1 more)"), "{said}");
    assert!(summary("x = '''\n").contains(": not valid TOML"));
    // A wrong value of a key that is not supported yet is one finding, not two.
    let said = summary(&format!("{SMALLEST}[readiness]\npasses = 0\n"));
    assert!(said.ends_with(":8:10: readiness.passes: 0 is not possible"), "{said}");
}

#[test]
fn no_control_character_of_the_file_gets_to_the_terminal() {
    // U+009B begins an escape sequence like ESC [.
    for text in ["a = \u{9b}31m", "[app]\n\"x\u{9b}\\u001b\u{7f}\" = 1\n", "[app]\n\"a\\nb\\u0085\" = 1\n"] {
        let errors = load_text(text).unwrap_err();
        let (all, line) = (errors.to_string(), errors.summary());
        assert!(!all.contains(|c: char| c.is_control() && c != '\n'), "{all:?}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

#[test]
fn the_control_socket_is_found_in_a_broken_file() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"[control]\nsocket = \"/run/a.sock\"\n[app\nbroken = = 1\n").unwrap();
    assert_eq!(control_socket(file.path()).unwrap(), Path::new("/run/a.sock"));
    assert!(control_socket(Path::new("/nonexistent/web.toml")).is_err());
}

#[test]
fn the_name_comes_from_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let text = SMALLEST.replace("name = \"web\"\n", "");
    let load_as = |name: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, &text).unwrap();
        load(&path)
    };
    assert_eq!(load_as("shop.toml").unwrap().app.name, "shop");
    let said = load_as("My Shop.toml").unwrap_err().summary();
    assert!(said.contains(":2:1: app.name: missing"), "{said}");
}
