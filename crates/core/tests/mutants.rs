//! The list of mutants fits the core: the old text of each is there, once.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn each_mutant_fits() {
    let core = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = BTreeSet::new();
    let lists = fs::read_dir(core.join("mutants")).unwrap().map(|entry| entry.unwrap().path());
    for list in lists.filter(|path| path.extension().is_some_and(|extension| extension == "txt")) {
        let source = core.join("src").join(list.file_name().unwrap()).with_extension("rs");
        let source = fs::read_to_string(source).unwrap();
        for mutant in fs::read_to_string(&list).unwrap().split("\n\n") {
            let mut lines = mutant.trim_end().lines();
            let (name, suffering) = lines.next().and_then(|line| line.split_once(": ")).unwrap();
            assert!(names.insert(name.to_owned()), "{name} is there twice");
            assert!(!suffering.is_empty(), "{name} hurts nobody");
            let text = |sign| {
                let lines: Vec<_> = lines.clone().filter_map(|line| line.strip_prefix(sign)).collect();
                lines.join("\n")
            };
            let (old, new) = (text('-'), text('+'));
            assert!(
                lines.clone().all(|line| line.starts_with(['-', '+'])),
                "{name} is more than old and new"
            );
            assert_ne!(old, new, "{name} changes nothing");
            assert_eq!(source.matches(&old).count(), 1, "{name}: {old} in {}", list.display());
        }
    }
    assert!(names.len() >= 40);
}
