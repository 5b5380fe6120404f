for folder in /usr/local/bin /root /bin /lib /dev /usr/include; do
  found=$(count "$folder") || exit 1
  expected=$(find "$folder" -type f 2> /dev/null | wc -l)
  [ "$found" -eq "$expected" ] || exit 1
done
