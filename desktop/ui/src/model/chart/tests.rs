use super::*;

fn bar(allowed: u64, rejected: u64) -> Bar {
    Bar {
        label: "14:00".into(),
        time: "14:00–15:00 CET".into(),
        allowed,
        rejected,
        completeness: Completeness::Complete,
    }
}

const ALL: Visible = Visible {
    allowed: true,
    rejected: true,
    selected: None,
};

fn attribute(svg: &str, class: &str, name: &str) -> Vec<u64> {
    svg.split("<rect ")
        .filter(|it| it.starts_with(&format!("class=\"{class}\"")))
        .map(|it| {
            let (_, rest) = it.split_once(&format!(" {name}=\"")).expect("an attribute");
            rest.split('"')
                .next()
                .expect("a value")
                .parse()
                .expect("a number")
        })
        .collect()
}

#[test]
fn gridlines_are_round_numbers_above_the_highest_bar() {
    for (max, step) in [
        (0, 1),
        (4, 1),
        (5, 2),
        (9, 5),
        (37, 10),
        (41, 20),
        (1204, 500),
        (3_999_999, 1_000_000),
    ] {
        assert_eq!(grid_step(max), step, "{max}");
    }
    assert!(grid_step(u64::MAX) > 1_000_000);
}

#[test]
fn numbers_are_shortened() {
    let texts = [0, 999, 1000, 1500, 20_000, 1_000_000, 2_500_000_000].map(short);
    assert_eq!(texts, ["0", "999", "1k", "1.5k", "20k", "1M", "2.5G"]);
}

#[test]
fn percentages_are_rounded() {
    assert_eq!(percent(38, 1242).as_deref(), Some("3.1%"));
    assert_eq!(percent(1, 3).as_deref(), Some("33.3%"));
    assert_eq!(percent(2, 3).as_deref(), Some("66.7%"));
    assert_eq!(percent(0, 5).as_deref(), Some("0.0%"));
    assert_eq!(percent(23_017, 1).as_deref(), Some("2,301,700.0%"));
    assert_eq!(percent(0, 0), None);
    assert_eq!(percent(u64::MAX, u64::MAX).as_deref(), Some("100.0%"));
}

#[test]
fn bars_are_as_high_as_their_numbers_and_stacked_with_a_gap() {
    let (plot, axis) = bar_chart(&[bar(200, 100), bar(0, 0), bar(400, 0)], ALL);
    let plot = plot.to_string();
    assert_eq!(attribute(&plot, "allowed", "height"), [102, 204]);
    assert_eq!(attribute(&plot, "rejected", "height"), [50]);
    let (allowed_top, rejected_top) = (
        attribute(&plot, "allowed", "y")[0],
        attribute(&plot, "rejected", "y")[0],
    );
    assert_eq!(rejected_top + 50 + 1, allowed_top);
    assert!(axis.to_string().contains(">400<"));
}

#[test]
fn anything_but_zero_is_visible() {
    let (plot, _) = bar_chart(&[bar(1, 0), bar(1_000_000, 1)], ALL);
    let plot = plot.to_string();
    assert_eq!(attribute(&plot, "allowed", "height")[0], 1);
    assert_eq!(attribute(&plot, "rejected", "height")[0], 1);
}

#[test]
fn hidden_series_does_not_count() {
    let visible = Visible {
        rejected: false,
        ..ALL
    };
    let (plot, axis) = bar_chart(&[bar(4, 4000)], visible);
    assert!(attribute(&plot.to_string(), "rejected", "height").is_empty());
    assert!(axis.to_string().contains(">4<"), "{axis}");
}

#[test]
fn missing_data_is_a_gap_and_says_so() {
    let missing = Bar {
        completeness: Completeness::Missing,
        ..bar(0, 0)
    };
    assert_eq!(missing.text(), "14:00–15:00 CET · no data yet");
    let table = bar_table("Requests", &[missing]).to_string();
    assert!(table.contains("–") && !table.contains(">0<"), "{table}");
    let so_far = Bar {
        completeness: Completeness::SoFar,
        ..bar(3, 1)
    };
    assert_eq!(
        so_far.text(),
        "14:00–15:00 CET · 3 allowed · 1 rejected (25.0%) so far"
    );
    let (plot, _) = bar_chart(&[so_far], ALL);
    assert!(plot.to_string().contains("allowed so-far"));
}

#[test]
fn at_most_eight_bars_have_a_label() {
    for bars in [1, 7, 8, 9, 24, 25, 31, 168, 720] {
        let labels: Vec<_> = label_positions(bars).collect();
        assert!(
            labels.len() <= MAX_LABELS && labels[0] == 0,
            "{bars}: {labels:?}"
        );
        assert!(labels.len() >= bars.min(4), "{bars}: {labels:?}");
    }
    assert_eq!(label_positions(0).count(), 0);
}

#[test]
fn nothing_to_show_is_an_empty_plot() {
    let (plot, _) = bar_chart(&[], ALL);
    assert!(plot.to_string().contains("class=\"grid\""));
    assert!(sparkline(&[]).to_string().starts_with("<svg"));
    assert_eq!(
        attribute(&sparkline(&[0, 7, 14]).to_string(), "allowed", "height"),
        [0, 14, 28]
    );
}
