use proptest::prelude::*;
use serde_json::json;

use super::*;

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..4)
                .prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn what_serde_json_writes_is_read_back(value in any_json()) {
        prop_assert_eq!(read::<Value>(&value.to_string()), Ok(value.clone()));
        prop_assert_eq!(read::<Value>(&serde_json::to_string_pretty(&value).unwrap()), Ok(value));
    }

    #[test]
    fn arbitrary_text_is_read_as_serde_json_reads_it(text in r#"[\[\]{},:"\\ntrufalse0-9e. ]{0,12}"#) {
        // Compares only text that serde_json accepts, because this parser also accepts redundant zeros and signs. Skips
        // text that may contain a float, because its last bits can differ.
        if let Ok(value) = serde_json::from_str::<Value>(&text)
            && !text.contains(['.', 'e', '-'])
        {
            prop_assert_eq!(read::<Value>(&text), Ok(value));
        }
    }

    #[test]
    fn arbitrary_text_does_not_panic(text: String) {
        let _ = read::<Value>(&text);
    }

    #[test]
    fn float_is_read_closely(number in -1e15..1e15_f64) {
        let read: f64 = read(&json!(number).to_string()).unwrap();
        prop_assert!((read - number).abs() <= number.abs() * 1e-14, "{number} {read}");
    }
}

#[test]
fn escapes_are_read() {
    let text = r#""\"\\\/\n\t\r\b\f\u00fc\ud83d\ude00""#;
    let expected = "\"\\/\n\t\r\u{8}\u{c}ü😀".to_owned();
    assert_eq!(read(text), Ok(expected.clone()));
    assert_eq!(serde_json::from_str::<String>(text).unwrap(), expected);
}

#[test]
fn floats_have_fractions_and_exponents() {
    let numbers = [
        ("0.5", 0.5),
        ("-12.25", -12.25),
        ("1e3", 1e3),
        ("2.5E-2", 2.5e-2),
        ("7", 7.0),
    ];
    for (text, number) in numbers {
        let read: f64 = read(text).unwrap();
        assert!((read - number).abs() < 1e-12, "{text} {read}");
    }
}

#[test]
fn extreme_exponents_give_zero_or_infinity() {
    for text in ["1e99999999999", "1e2147483647", "12345.678e400"] {
        assert_eq!(read(text), Ok(f64::INFINITY), "{text}");
    }
    for text in [
        "1e-99999999999",
        "0.1e-2147483648",
        "0e400",
        "0.0e99999999999",
    ] {
        assert_eq!(read(text), Ok(0.0), "{text}");
    }
    assert_eq!(read("-1e99999999999"), Ok(f64::NEG_INFINITY));
}

#[test]
fn anything_else_is_invalid() {
    let texts = [
        "",
        " ",
        "nul",
        "truex",
        "[1",
        "[1,]",
        "[,]",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{a:1}",
        "\"",
        "\"\\\"",
        "\"\\x\"",
        "\"\\u12\"",
        "\"\\u+041\"",
        "\"\\ud83d\"",
        "\"\\ud83dx\"",
        "\"\\udc00\"",
        "1 2",
        "[] []",
        "+1",
        "é",
    ];
    for text in texts {
        assert_eq!(read::<Value>(text), Err(Invalid), "{text}");
    }
}

#[test]
fn deep_nesting_is_rejected() {
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    assert!(read::<Value>(&nested(90)).is_ok());
    assert_eq!(read::<Value>(&nested(100_000)), Err(Invalid));
}

#[test]
fn integers_keep_their_range() {
    assert_eq!(read("18446744073709551615"), Ok(u64::MAX));
    assert_eq!(read::<u64>("-1"), Err(Invalid));
    assert_eq!(read::<u64>("1.5"), Err(Invalid));
    assert_eq!(read::<u32>("4294967296"), Err(Invalid));
    assert_eq!(read::<Option<u32>>("null"), Ok(None));
    assert_eq!(read::<bool>("1"), Err(Invalid));
}
