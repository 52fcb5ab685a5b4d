//! The test guests of `tests/guests`: what each is for, what VM it wants, and how it ends.

/// The machine as far as a guest's split locks are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// The processor has no split-lock detection; whatever the mode.
    NoFeature,
    /// It has, and the hypervisor's mode is `off`.
    Off,
    /// Mode `warn`.
    Warn,
    /// Mode `fatal`.
    Fatal,
}

impl Situation {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::NoFeature, Self::Off, Self::Warn, Self::Fatal];
}

/// How a VM ends, as the event `vm-end` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this status.
    Exit(u8),
    /// Stopped for a split lock.
    SplitLock,
    /// By a triple fault.
    TripleFault,
    /// Halted where nothing can wake it.
    Halt,
    /// Stopped after the time that its VM had.
    TimeLimit,
}

impl End {
    /// The event's `reason`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Exit(_) => "exit",
            Self::SplitLock => "split lock",
            Self::TripleFault => "triple fault",
            Self::Halt => "halt",
            Self::TimeLimit => "time limit",
        }
    }

    /// The event's `status`, where it has one.
    pub fn status(self) -> Option<u8> {
        match self {
            Self::Exit(status) => Some(status),
            _ => None,
        }
    }
}

/// What a run of a guest, alone on its machine, shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// How it ends.
    pub end: End,
    /// Number of `ac` events with verdict `inject`; the least number where a time limit ends it.
    pub inject: u32,
    /// Number of `ac` events with verdict `warn`.
    pub warn: u32,
    /// Number of `ac` events with verdict `kill`.
    pub kill: u32,
    /// Split locks that detection stopped, as the machine's ground truth counts them. Not those
    /// that legacy alignment checking stops: it comes first.
    pub faulted: u32,
    /// Split locks that took the bus, as the machine's ground truth counts them.
    pub taken: u32,
}

/// Exit status of a guest that saw what it is there to see.
pub const SUCCESS: u8 = status(0x10);
/// Exit status of a guest whose subject the processor does not offer.
pub const NOT_OFFERED: u8 = status(0x1F);

/// What `isa-debug-exit` makes of a code below 0x80.
const fn status(code: u8) -> u8 {
    code << 1 | 1
}

/// Time of a guest that would not end, and #AC that it has in it at least.
const LIMIT_TICKS: u64 = 3_000_000;
const MANY: u32 = 100;

/// How a guest deals with split locks; with the [`Situation`] it says what happens.
#[derive(Clone, Copy, Debug)]
enum Behaviour {
    /// Splits that many locks, at least one, and knows nothing of detection.
    Unaware(u32),
    /// Turns detection on, splits that many locks and gets as many #AC.
    Aware(u32),
    /// Turns detection on and gets one #AC, off and splits that many locks, on and gets one #AC.
    Toggles(u32),
    /// That many #AC of legacy alignment checking.
    Legacy(u32),
    /// That many of them, then, where it is offered, detection on and as many #AC again.
    LegacyAndAware(u32),
    /// That many split locks as of [`Behaviour::Unaware`], and that many #AC of legacy alignment
    /// checking besides, none of which comes first.
    Mixed(u32, u32),
    /// #AC of legacy alignment checking without end.
    LegacyForEver,
    /// No #AC, and always the same end.
    None(End),
}

/// A test guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Name of its binary, and of its VM.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// Memory of its VM, in MiB.
    pub memory_mib: u32,
    /// Number of vCPUs of its VM.
    pub vcpus: u32,
    /// Its command line, unless told otherwise.
    pub command_line: &'static str,
    /// Whether split-lock detection is exposed to its VM.
    pub expose_sld: bool,
    /// Whether `cargo xtask run` runs it unless told otherwise.
    pub demo: bool,
    behaviour: Behaviour,
}

impl Guest {
    const fn new(name: &'static str, about: &'static str, behaviour: Behaviour) -> Self {
        let expose_sld = matches!(
            behaviour,
            Behaviour::Aware(_) | Behaviour::Toggles(_) | Behaviour::LegacyAndAware(_)
        );
        Self {
            name,
            about,
            memory_mib: 8,
            vcpus: 1,
            command_line: "",
            expose_sld,
            demo: false,
            behaviour,
        }
    }

    const fn with_vcpus(self, vcpus: u32) -> Self {
        Self { vcpus, ..self }
    }

    const fn in_demo(self) -> Self {
        Self { demo: true, ..self }
    }

    /// How long its VM may run, in ticks of the time-stamp counter, if it does not end by itself.
    pub fn limit_ticks(&self) -> Option<u64> {
        let endless =
            matches!(self.behaviour, Behaviour::LegacyForEver | Behaviour::None(End::TimeLimit));
        endless.then_some(LIMIT_TICKS)
    }

    /// What a run of it shows.
    pub fn expected(&self, situation: Situation) -> Expected {
        use Situation::{Fatal, NoFeature, Off, Warn};
        let nothing =
            Expected { end: End::Exit(SUCCESS), inject: 0, warn: 0, kill: 0, faulted: 0, taken: 0 };
        let killed = Expected { end: End::SplitLock, kill: 1, faulted: 1, ..nothing };
        match (self.behaviour, situation) {
            (Behaviour::Unaware(locks), NoFeature | Off) => Expected { taken: locks, ..nothing },
            // The first faults, is warned of and happens after all; from then on nothing looks.
            (Behaviour::Unaware(locks), Warn) => {
                Expected { warn: 1, faulted: 1, taken: locks, ..nothing }
            }
            (Behaviour::Unaware(_), Fatal) => killed,
            (Behaviour::Aware(_) | Behaviour::Toggles(_), NoFeature | Off) => {
                Expected { end: End::Exit(NOT_OFFERED), ..nothing }
            }
            (Behaviour::Aware(locks), Warn | Fatal) => {
                Expected { inject: locks, faulted: locks, ..nothing }
            }
            (Behaviour::Toggles(locks), Warn) => {
                Expected { inject: 2, faulted: 2, taken: locks, ..nothing }
            }
            // Under `fatal` "off" is stored and changes nothing.
            (Behaviour::Toggles(_), Fatal) => Expected { inject: 1, faulted: 2, ..killed },
            (Behaviour::Mixed(locks, faults), _) => {
                let unaware = Self { behaviour: Behaviour::Unaware(locks), ..*self };
                let expected = unaware.expected(situation);
                // Stopped before the first of them.
                let stopped = matches!(expected.end, End::SplitLock);
                Expected { inject: if stopped { 0 } else { faults }, ..expected }
            }
            (Behaviour::Legacy(faults), _)
            | (Behaviour::LegacyAndAware(faults), NoFeature | Off) => {
                Expected { inject: faults, ..nothing }
            }
            (Behaviour::LegacyAndAware(faults), Warn | Fatal) => {
                Expected { inject: 2 * faults, faulted: faults, ..nothing }
            }
            (Behaviour::LegacyForEver, _) => {
                Expected { end: End::TimeLimit, inject: MANY, ..nothing }
            }
            (Behaviour::None(end), _) => Expected { end, ..nothing },
        }
    }
}

/// The guests of the demonstration, in the order in which they are shown.
pub fn demo() -> impl Iterator<Item = &'static Guest> {
    GUESTS.iter().filter(|guest| guest.demo)
}

/// Every test guest.
pub const GUESTS: &[Guest] = &[
    Guest::new("split-add-cpl0", "LOCK ADD across two cache lines at CPL 0", Behaviour::Unaware(3))
        .in_demo(),
    Guest::new("split-add-cpl3", "LOCK ADD across two cache lines at CPL 3", Behaviour::Unaware(3)),
    Guest::new("split-xchg-cpl0", "XCHG across two cache lines at CPL 0", Behaviour::Unaware(3)),
    Guest::new("split-xchg-cpl3", "XCHG across two cache lines at CPL 3", Behaviour::Unaware(3))
        .in_demo(),
    Guest::new(
        "split-page",
        "LOCK ADD and XCHG across two pages at CPL 0 and CPL 3",
        Behaviour::Unaware(12),
    ),
    Guest::new("split-sites", "split locks at places of their own", Behaviour::Unaware(10)),
    Guest::new("split-storm", "1000 split locks in a loop", Behaviour::Unaware(1000)),
    Guest::new("split-real", "split locks in real mode", Behaviour::Unaware(6)),
    Guest::new("split-vm86", "split locks in virtual-8086 mode", Behaviour::Unaware(6)),
    Guest::new(
        "controls",
        "locked accesses that are not split, split ones that are not locked",
        Behaviour::None(End::Exit(SUCCESS)),
    )
    .in_demo(),
    Guest::new(
        "sld-aware",
        "finds split-lock detection, turns it on, expects its #AC",
        Behaviour::Aware(4),
    )
    .in_demo(),
    Guest::new(
        "sld-aware-16bit",
        "the same in real mode and virtual-8086 mode",
        Behaviour::Aware(4),
    ),
    Guest::new(
        "sld-toggle",
        "turns its split-lock detection on, off and on again",
        Behaviour::Toggles(3),
    ),
    Guest::new(
        "sld-shared",
        "split locks between long work, for VMs that share a CPU",
        Behaviour::Unaware(100),
    ),
    Guest::new(
        "sld-hidden",
        "looks for split-lock detection where it is not exposed",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "sld-hint",
        "reads what the hypervisor says of split locks",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "legacy-ac",
        "legacy alignment checking at CPL 3, expects its own #AC",
        Behaviour::Legacy(6),
    )
    .in_demo(),
    Guest::new(
        "ac-delivery",
        "events whose delivery raises #AC, and that arrive after it",
        Behaviour::Legacy(10),
    ),
    Guest::new("ac-loop", "#AC whose delivery raises #AC, for ever", Behaviour::LegacyForEver),
    Guest::new(
        "verdict-rows",
        "split locks at all privilege levels, with all of CR0.AM and EFLAGS.AC",
        // Three at each of 24 places, two of which are under legacy alignment checking.
        Behaviour::Mixed(66, 2),
    ),
    Guest::new("triple-fault", "an exception without an IDT", Behaviour::None(End::TripleFault)),
    Guest::new("hlt-forever", "halts with interrupts off", Behaviour::None(End::Halt)),
    Guest::new(
        "wild",
        "jumps to where no memory is, expects its own #UD",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "bad-rip",
        "jumps to unmapped addresses, expects its own #PF",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "privileged",
        "control registers, EFER, XCR0: what is forbidden and what is not",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "registers",
        "every register across every kind of exit and the turns of others",
        // One #AC of its own a round.
        Behaviour::Legacy(4),
    ),
    Guest::new(
        "apic",
        "local APIC: IPIs, NMIs, priorities, the timer, HLT",
        // An interrupt waits for its handler.
        Behaviour::Legacy(1),
    ),
    Guest::new(
        "isolation",
        "memory, ports and registers beyond what a guest is given",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "vmx-hidden",
        "VT-x is neither offered nor usable in a guest",
        Behaviour::None(End::Exit(SUCCESS)),
    ),
    Guest::new(
        "smp",
        "several vCPUs: start, IPIs, NMIs, HLT, timers, INIT, stale translations",
        Behaviour::None(End::Exit(SUCCESS)),
    )
    .with_vcpus(4),
    Guest::new(
        "locked-ops",
        "random locked instructions, aligned and split, with equal outcomes",
        Behaviour::Unaware(200),
    ),
    Guest::new(
        "stepping",
        "split locks that fault, trap and are interrupted as well",
        Behaviour::Unaware(4),
    ),
    Guest {
        command_line: "role=calm vcpus=2 seed=1",
        ..Guest::new(
            "stress",
            "works by pseudo-random numbers on all vCPUs, for ever",
            Behaviour::None(End::TimeLimit),
        )
        .with_vcpus(2)
    },
    Guest {
        memory_mib: 16,
        command_line: "victim",
        ..Guest::new(
            "hostile",
            "takes more of the CPUs than its share, or measures what others leave of them",
            Behaviour::None(End::Exit(SUCCESS)),
        )
        .with_vcpus(2)
    },
    // One to see whether it comes, ten to warm up, 100 that count.
    Guest::new("bench", "times what leaving the guest costs", Behaviour::LegacyAndAware(111)),
];

/// The guest of that name.
pub fn find(name: &str) -> Option<&'static Guest> {
    GUESTS.iter().find(|guest| guest.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::{fs, path::Path};

    use super::*;

    fn names() -> BTreeSet<String> {
        GUESTS.iter().map(|guest| guest.name.to_owned()).collect()
    }

    #[test]
    fn every_guest_is_registered_once() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guests/src/bin");
        let files: BTreeSet<String> = fs::read_dir(sources)
            .unwrap()
            .map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(files, names());
        assert_eq!(GUESTS.len(), names().len());
    }

    #[test]
    fn every_guest_is_built_without_a_test_harness() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guests/Cargo.toml");
        let manifest: toml::Table = fs::read_to_string(manifest).unwrap().parse().unwrap();
        let listed: BTreeSet<String> = manifest["bin"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|target| target["test"].as_bool() == Some(false))
            .map(|target| target["name"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(listed, names());
    }

    #[test]
    fn names_fit_the_configuration() {
        for guest in GUESTS {
            assert!((1..=31).contains(&guest.name.len()), "{}", guest.name);
            let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            assert!(guest.name.chars().all(fits), "{}", guest.name);
            assert!((1..=16).contains(&guest.vcpus), "{}", guest.name);
            // What the runtime reads of it.
            assert!(guest.command_line.len() <= 256, "{}", guest.name);
        }
    }

    #[test]
    fn expectations_are_consistent() {
        for guest in GUESTS {
            for situation in Situation::ALL {
                let Expected { end, inject, warn, kill, faulted, taken } =
                    guest.expected(situation);
                let context = format!("{} {situation:?}", guest.name);
                assert_eq!(kill, u32::from(end == End::SplitLock), "{context}");
                assert!(end.status().is_none_or(|status| status % 2 == 1), "{context}");
                // Whatever detection stops leads to a verdict; a verdict without one is legacy
                // alignment checking.
                assert!(faulted <= inject + warn + kill, "{context}");
                match situation {
                    Situation::NoFeature | Situation::Off => {
                        assert_eq!((warn, kill, faulted), (0, 0, 0), "{context}");
                    }
                    Situation::Warn => assert_eq!(kill, 0, "{context}"),
                    Situation::Fatal => assert_eq!((warn, taken), (0, 0), "{context}"),
                }
            }
        }
    }

    #[test]
    fn the_demo_shows_every_verdict() {
        assert!(demo().any(|guest| guest.expected(Situation::Warn).warn > 0));
        assert!(demo().any(|guest| guest.expected(Situation::Fatal).kill > 0));
        assert!(demo().any(|guest| guest.expected(Situation::Fatal).inject > 0));
    }

    #[test]
    fn find_finds_by_exact_name() {
        assert_eq!(find("controls").map(|guest| guest.name), Some("controls"));
        assert!(find("control").is_none());
    }
}
