//! From facts to findings. Nothing here looks at the machine.

mod kernel;
mod rights;
mod settings;
mod steering;
#[cfg(test)]
mod tests;

use super::facts::Facts;
use super::finding::Finding;

/// Every finding, in the order in which it is told.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![kernel::version(facts), kernel::classic_program(facts), kernel::cgroup2(facts)];
    findings.push(kernel::force_reuseport(facts));
    findings.extend(rights::all(facts));
    findings.extend(settings::all(facts));
    findings.extend(steering::all(facts));
    findings
}
