//! The profile: which instructions the hypervisor executes between a guest's exit and the next
//! entry to a guest.
//!
//! Such a stretch is a *visit* to the host. Visits that begin at the same guest instruction for the
//! same reason and execute the same instructions equally often are one line of the profile, with the
//! number of such visits:
//!
//! ```text
//! {"guest":"0x101234","reason":10,"switched":false,"count":100,"instructions":[["0xffffffff80001000",1],…]}
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `guest` | RIP of the last instruction that the guest executed or tried to |
//! | `reason` | basic exit reason |
//! | `switched` | whether another VMCS was entered than was left |
//! | `count` | number of these visits |
//! | `instructions` | instruction pointers in order, each with how often it was executed; every repetition of a string instruction counts, as it does in the time-stamp counter |

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, BufWriter, Write};

/// A CPU about to execute an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// In VMX non-root operation.
    pub in_guest: bool,
    /// The instruction's RIP.
    pub rip: u64,
    /// Address of the current VMCS.
    pub vmcs: u64,
    /// RCX, the repetitions that are left if it is a repeated string instruction.
    pub rcx: u64,
}

/// A visit that has not ended.
#[derive(Debug)]
struct Open {
    guest: u64,
    reason: u32,
    vmcs: u64,
    instructions: HashMap<u64, u64>,
}

/// What is known of a CPU.
#[derive(Debug, Default)]
struct Cpu {
    visit: Option<Open>,
    /// RIP of the present instruction.
    rip: u64,
    /// RCX where it began.
    rcx: u64,
    /// It has begun and is not counted yet.
    begun: bool,
    /// It is a repeated string instruction.
    repeats: bool,
}

impl Cpu {
    fn count(&mut self, times: u64) {
        self.begun = false;
        if let Some(visit) = &mut self.visit {
            *visit.instructions.entry(self.rip).or_default() += times;
        }
    }
}

/// A visit as a line tells it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Visit {
    guest: u64,
    reason: u32,
    switched: bool,
    instructions: Vec<(u64, u64)>,
}

/// The profile of a machine.
#[derive(Debug, Default)]
pub struct Profile {
    cpus: HashMap<u32, Cpu>,
    visits: BTreeMap<Visit, u64>,
}

impl Profile {
    fn cpu(&mut self, cpu: u32) -> &mut Cpu {
        self.cpus.entry(cpu).or_default()
    }

    /// A CPU begins an instruction. Bochs also says so of a place where it only ends a run of decoded
    /// instructions, and then once more for the instruction there.
    pub fn begin(&mut self, cpu: u32, Step { in_guest, rip, vmcs, rcx }: Step) {
        let cpu = self.cpu(cpu);
        if cpu.begun && cpu.rip != rip {
            // The one before ended in a fault.
            cpu.count(1);
        }
        let visit = if in_guest { cpu.visit.take() } else { None };
        *cpu = Cpu { visit: cpu.visit.take(), rip, rcx, begun: true, repeats: false };
        if let Some(Open { guest, reason, vmcs: left, instructions }) = visit {
            let mut instructions: Vec<_> = instructions.into_iter().collect();
            instructions.sort_unstable();
            let visit = Visit { guest, reason, switched: left != vmcs, instructions };
            *self.visits.entry(visit).or_default() += 1;
        }
    }

    /// A CPU has gone through one or more repetitions of its present instruction.
    pub fn repeat(&mut self, cpu: u32) {
        self.cpu(cpu).repeats = true;
    }

    /// A CPU has completed its present instruction, or as many repetitions of it as it could at once.
    pub fn complete(&mut self, cpu: u32, rcx: u64) {
        let cpu = self.cpu(cpu);
        cpu.count(if cpu.repeats { cpu.rcx.wrapping_sub(rcx) } else { 1 });
    }

    /// A CPU leaves its guest.
    pub fn exit(&mut self, cpu: u32, reason: u32, vmcs: u64) {
        /// The VM entry failed: the host goes on.
        const ENTRY_FAILURE: u32 = 1 << 31;
        let cpu = self.cpu(cpu);
        if reason & ENTRY_FAILURE == 0 {
            cpu.begun = false;
            let reason = reason & 0xffff;
            cpu.visit = Some(Open { guest: cpu.rip, reason, vmcs, instructions: HashMap::new() });
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn write(&self, file: &File) -> io::Result<()> {
        let mut out = BufWriter::new(file);
        for (visit, count) in &self.visits {
            writeln!(out, "{}", Line(visit, *count))?;
        }
        out.flush()
    }
}

struct Line<'a>(&'a Visit, u64);

impl Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Visit { guest, reason, switched, instructions }, count) = self;
        write!(
            f,
            r#"{{"guest":"{guest:#x}","reason":{reason},"switched":{switched},"count":{count},"instructions":["#
        )?;
        for (index, (rip, times)) in instructions.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            write!(f, r#"{separator}["{rip:#x}",{times}]"#)?;
        }
        f.write_str("]}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Step = Step { in_guest: true, rip: 0x100, vmcs: 1, rcx: 0 };
    const HOST: Step = Step { in_guest: false, rip: 0xf000, vmcs: 1, rcx: 0 };

    impl Profile {
        fn instruction(&mut self, step: Step) {
            self.begin(0, step);
            self.complete(0, 0);
        }

        /// An exit from [`GUEST`], these instructions, an entry.
        fn visit(&mut self, rips: &[u64], vmcs: u64) {
            self.begin(0, GUEST);
            self.exit(0, 10, 1);
            rips.iter().for_each(|&rip| self.instruction(Step { rip, ..HOST }));
            self.instruction(Step { vmcs, ..GUEST });
        }

        fn lines(&self) -> Vec<String> {
            self.visits.iter().map(|(visit, count)| Line(visit, *count).to_string()).collect()
        }
    }

    fn line(switched: bool, count: u64, instructions: &str) -> String {
        format!(
            r#"{{"guest":"0x100","reason":10,"switched":{switched},"count":{count},"instructions":[{instructions}]}}"#
        )
    }

    #[test]
    fn what_comes_before_the_first_exit_is_not_a_visit() {
        let mut profile = Profile::default();
        profile.begin(0, HOST);
        profile.repeat(0);
        profile.complete(0, 0);
        profile.instruction(GUEST);
        profile.instruction(GUEST);
        assert!(profile.lines().is_empty());
    }

    #[test]
    fn equal_visits_are_one_line_and_others_are_not() {
        let mut profile = Profile::default();
        profile.visit(&[0xf000, 0xf008, 0xf000], 1);
        profile.visit(&[0xf008, 0xf000, 0xf000], 1);
        profile.visit(&[0xf000], 1);
        profile.visit(&[0xf000], 2);
        let expected = [
            line(false, 1, r#"["0xf000",1]"#),
            line(false, 2, r#"["0xf000",2],["0xf008",1]"#),
            line(true, 1, r#"["0xf000",1]"#),
        ];
        assert_eq!(profile.lines(), expected);
    }

    #[test]
    fn repetitions_count() {
        let mut profile = Profile::default();
        profile.begin(0, GUEST);
        profile.exit(0, 10, 1);
        // Ten repetitions with a pause after the seventh.
        for (before, after) in [(10, 3), (3, 0)] {
            profile.begin(0, Step { rcx: before, ..HOST });
            profile.repeat(0);
            profile.repeat(0);
            profile.complete(0, after);
        }
        // No repetition is an instruction all the same; so is one that uses RCX for something else.
        profile.instruction(HOST);
        profile.begin(0, Step { rcx: 8, ..HOST });
        profile.complete(0, 0);
        profile.instruction(GUEST);
        assert_eq!(profile.lines(), [line(false, 1, r#"["0xf000",12]"#)]);
    }

    #[test]
    fn faults_count_and_ends_of_decoded_runs_do_not() {
        let mut profile = Profile::default();
        profile.begin(0, GUEST);
        profile.exit(0, 10, 1);
        // Begun twice, completed once.
        profile.begin(0, HOST);
        profile.instruction(HOST);
        // Begun, but its handler comes next.
        profile.begin(0, HOST);
        profile.instruction(Step { rip: 0xf100, ..HOST });
        profile.instruction(GUEST);
        assert_eq!(profile.lines(), [line(false, 1, r#"["0xf000",2],["0xf100",1]"#)]);
    }

    #[test]
    fn a_failed_entry_and_other_cpus_do_not_end_a_visit() {
        let mut profile = Profile::default();
        profile.begin(0, GUEST);
        profile.exit(0, 10, 1);
        profile.begin(0, HOST);
        profile.exit(0, 33 | 1 << 31, 1);
        profile.begin(1, GUEST);
        profile.complete(1, 0);
        profile.instruction(Step { rip: 0xf008, ..HOST });
        profile.instruction(GUEST);
        assert_eq!(profile.lines(), [line(false, 1, r#"["0xf000",1],["0xf008",1]"#)]);
    }
}
